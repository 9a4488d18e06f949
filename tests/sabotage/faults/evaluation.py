"""Faults in scores: bits per byte, log-likelihoods, answers of tasks, and the figures of a study."""

from tests.sabotage.fault import Fault

PERPLEXITY, LM, ANSWERS = "evaluate/perplexity.py", "evaluate/lm.py", "evaluate/answers.py"
BASELINES, INTERVALS, SCORING = "study/baselines.py", "study/intervals.py", "study/scoring.py"
OF_PERPLEXITY, OF_LM = "tests/evaluate/test_perplexity.py", "tests/evaluate/test_lm.py"
OF_SCORES, OF_SUITES = "tests/evaluate/test_scores.py", "tests/evaluate/test_suites.py"
OF_BASELINES, OF_SOUPS = "tests/study/test_baselines.py", "tests/study/test_soups.py"
OF_INTERVALS, OF_TABLES = "tests/study/test_intervals.py", "tests/study/test_tables.py"

EVALUATION = (
    Fault(
        "scores run all experts, whatever the model's top-k",
        "api.py",
        "Decoder(self.config, self.top_k, ",
        "Decoder(self.config, None, ",
        f"{OF_SCORES}::test_a_score_runs_only_the_top_k_experts",
    ),
    Fault(
        "a score with equal weights follows the router",
        "api.py",
        "run = self.decoder(uniform)",
        "run = self.decoder()",
        "tests/test_api.py::test_uniform_weights_ignore_the_router",
    ),
    Fault(
        "bits are counted per character, not per byte",
        PERPLEXITY,
        "bytes_D = np.array([len(text.encode()) for text in texts])",
        "bytes_D = np.array([len(text) for text in texts])",
        f"{OF_SCORES}::test_bits_are_per_byte_of_utf8_and_of_base_2",
    ),
    Fault(
        "nats are called bits",
        PERPLEXITY,
        "self.nats_D.sum() / math.log(2) / ",
        "self.nats_D.sum() / ",
        f"{OF_SCORES}::test_bits_are_per_byte_of_utf8_and_of_base_2",
    ),
    Fault(
        "routed shares do not add up to 1 where only some experts are active",
        PERPLEXITY,
        "weights_LNE / weights_LNE.sum(-1, keepdims=True)",
        "weights_LNE",
        f"{OF_SCORES}::test_a_score_runs_only_the_top_k_experts",
    ),
    Fault(
        "documents of a score get one another's numbers",
        PERPLEXITY,
        "token_nats[doc].append(nats_T[weights_T > 0])",
        "token_nats[-1 - doc].append(nats_T[weights_T > 0])",
        f"{OF_SCORES}::test_a_score_of_a_document_does_not_depend_on_the_others",
    ),
    Fault(
        "held-out text beyond the asked bytes is scored",
        PERPLEXITY,
        "if texts and size > max_bytes:",
        "if not texts and size > max_bytes:",
        f"{OF_SCORES}::test_held_out_text_ends_at_the_asked_bytes",
    ),
    Fault(
        "a long context loses its end",
        LM,
        "context[-longest:]",
        "context[:longest]",
        f"{OF_LM}::test_loglikelihoods_equal_those_of_the_logits",
    ),
    Fault(
        "a long prompt loses its end",
        LM,
        "row[-room:]",
        "row[:room]",
        f"{OF_LM}::test_a_long_prompt_keeps_its_end",
    ),
    Fault(
        "the first token of a continuation is not scored",
        LM,
        "targets_BT[b, len(context) - 1 : len(whole) - 1] = continuation",
        "targets_BT[b, len(context) : len(whole) - 1] = continuation[1:]",
        f"{OF_LM}::test_loglikelihoods_equal_those_of_the_logits",
    ),
    Fault(
        "continuations of a shared context do not see its last token",
        LM,
        "[context[-1], *continuation[:-1]]",
        "[0, *continuation[:-1]]",
        f"{OF_LM}::test_loglikelihoods_equal_those_of_the_logits",
    ),
    Fault(
        "text does not end at a stop string",
        LM,
        "return text[: min(found)] if found else text",
        "return text",
        f"{OF_LM}::test_text_ends_at_a_stop_string_or_the_length",
    ),
    Fault(
        "choices are never compared per character",
        ANSWERS,
        'if metric == "acc_per_char":',
        'if metric == "":',
        f"{OF_SUITES}::test_choices_are_compared_per_character_if_the_task_has_that_metric",
    ),
    Fault(
        "the first number of an answer counts",
        ANSWERS,
        "float(found[-1].replace",
        "float(found[0].replace",
        f"{OF_SUITES}::test_the_last_number_of_an_answer_counts",
    ),
    Fault(
        "programs of a model run without being asked",
        "evaluate/tasks.py",
        "if task.kind == PROGRAM and not gold and not allow_code_execution:",
        "if task.kind == PROGRAM and gold and not allow_code_execution:",
        f"{OF_SUITES}::test_code_runs_only_if_it_is_allowed",
    ),
    Fault(
        "intervals hold 90%, not 95%",
        INTERVALS,
        "(0.025, 0.975)",
        "(0.05, 0.95)",
        f"{OF_INTERVALS}::test_an_interval_leaves_out_a_fortieth_at_either_end",
    ),
    Fault(
        "the value of an interval is the mean of its resamples",
        INTERVALS,
        "Interval(float(values_R[0]), ",
        "Interval(float(values_R[1:].mean()), ",
        f"{OF_INTERVALS}::test_an_interval_leaves_out_a_fortieth_at_either_end",
    ),
    Fault(
        "intervals do not vary over seeds",
        INTERVALS,
        "(counts_RS * ratio_RS).sum(1) / counts_RS.sum(1)",
        "ratio_RS.mean(1)",
        f"{OF_INTERVALS}::test_seeds_that_differ_widen_it",
    ),
    Fault(
        "a difference from the method has the wrong sign",
        "study/tables.py",
        "values_R - bits_R[METHOD][d]",
        "bits_R[METHOD][d] - values_R",
        f"{OF_TABLES}::test_the_tables_hold_means_and_paired_differences",
    ),
    Fault(
        "a text that is cut is scored on an end of text",
        SCORING,
        "nats_T if text.ends else nats_T[:-1]",
        "nats_T",
        f"{OF_TABLES}::test_a_text_that_is_cut_is_not_scored_on_an_end_of_text",
    ),
    Fault(
        "a soup ignores its weights",
        BASELINES,
        "[1.0 if weights is None else weights[name] for name in names]",
        "[1.0 for name in names]",
        f"{OF_SOUPS}::test_a_soup_is_the_weighted_mean_of_every_leaf",
    ),
    Fault(
        "the weights of a soup do not add up to 1",
        BASELINES,
        "shares /= shares.sum()",
        "shares /= 1",
        f"{OF_SOUPS}::test_a_soup_is_the_weighted_mean_of_every_leaf",
    ),
    Fault(
        "the posterior of causal BTM sees the token that it predicts",
        BASELINES,
        "np.cumsum(doc_ET, axis=1) - doc_ET",
        "np.cumsum(doc_ET, axis=1)",
        f"{OF_BASELINES}::test_causal_btm_is_the_posterior_mixture_whose_total_is_the_mean_likelihood",
    ),
    Fault(
        "BTM's temperature multiplies",
        BASELINES,
        "-doc_ET.mean(1) / temperature",
        "-doc_ET.mean(1) * temperature",
        f"{OF_BASELINES}::test_btm_is_the_mixture_with_its_weights",
    ),
    Fault(
        "the oracle takes the worst model",
        BASELINES,
        "nats[min(totals, ",
        "nats[max(totals, ",
        f"{OF_BASELINES}::test_the_oracle_takes_all_documents_from_the_expert_with_the_lowest_total",
    ),
    Fault(
        "BTX keeps the trunk of the public model",
        BASELINES,
        "soup({name: {TRUNK: params[TRUNK]} for name, params in models.items()})",
        "soup({PUBLIC: {TRUNK: models[PUBLIC][TRUNK]}})",
        f"{OF_SOUPS}::test_btx_keeps_feed_forward_networks_and_averages_the_rest",
    ),
    Fault(
        "a calibration shifts the public expert's bias too",
        SCORING,
        "(0 if name == PUBLIC else shift)",
        "shift",
        f"{OF_TABLES}::test_calibrations_scale_odds_and_shift_owners_biases_only",
    ),
    Fault(
        "the study's BTM mixes the method's model in",
        "study/systems.py",
        "models = [PUBLIC, *dense.values()]",
        "models = [PUBLIC, METHOD, *dense.values()]",
        "tests/study/test_systems.py::test_mixtures_find_the_scores_of_the_public_model_and_of_the_dense_experts",
    ),
)
