"""Faults in what owners tune, and where training says it is exact: schedules, groups, mixtures, rates, precision."""

from tests.sabotage.fault import Fault

OPTIMIZER, LR_FIND = "training/optimizer.py", "training/lr_find.py"
OF_OPTIMIZER, OF_SCHEDULES = "tests/training/test_optimizer.py", "tests/training/test_schedules.py"
OF_LR_FIND, OF_PRECISION = "tests/training/test_lr_find.py", "tests/training/test_precision.py"

TUNING = (
    Fault(
        "none is taken for a default that is another",
        "experiment.py",
        "if value is not None or name in chosen}",
        "if value is not None}",
        "tests/test_config.py::test_none_is_a_value_where_the_default_is_another",
    ),
    Fault(
        "a group's learning rate is that of the others",
        OPTIMIZER,
        "_factor([group.lr for group in own], leaf)",
        "1.0",
        f"{OF_OPTIMIZER}::test_a_group_scales_the_rate_of_its_leaves_only",
    ),
    Fault(
        "norms, rows and biases decay without being asked to",
        "optimizer_config.py",
        'DECAYED = "(.*/)?w_[^/]*|trunk/head"',
        'DECAYED = ".*"',
        f"{OF_OPTIMIZER}::test_only_matrices_and_the_head_decay_unless_asked",
    ),
    Fault(
        "the schedule of a longer run is another curve",
        OPTIMIZER,
        "config.schedule_steps or steps",
        "steps",
        f"{OF_SCHEDULES}::test_a_resumed_longer_run_follows_the_schedule_of_its_start",
    ),
    Fault(
        "a resumed longer run bends its schedule",
        "training/resume.py",
        '.get("schedule_steps") if started else None',
        '.get("schedule_steps") if not started else None',
        f"{OF_SCHEDULES}::test_a_resumed_longer_run_follows_the_schedule_of_its_start",
    ),
    Fault(
        "wsd decays from its warm-up on",
        OPTIMIZER,
        "[length - decay]",
        "[warmup]",
        f"{OF_OPTIMIZER}::test_wsd_is_stable_and_then_linear_and_restarts_begin_at_the_peak_again",
    ),
    Fault(
        "a new expert's bias does not start where it is told",
        "training/start.py",
        "run.bias_init, np.float32)",
        "0.0, np.float32)",
        f"{OF_SCHEDULES}::test_a_new_experts_bias_starts_where_it_is_told_and_groups_are_said",
    ),
    Fault(
        "the epochs of a source are those of the mixture",
        "data/pipeline.py",
        "Seen(rows * self.seq_len, rows / windows)",
        "Seen(rows * self.seq_len, n * self.rows / windows)",
        "tests/data/test_pipeline.py::test_a_mixed_batch_holds_the_rows_that_are_counted_and_goes_through_every_source_in_epochs",
    ),
    Fault(
        "sources of a mixture have equal shares, whatever their weights",
        "data/pipeline.py",
        "-(-(given + 1) * total // weights)",
        "given",
        "tests/data/test_pipeline.py::test_every_source_has_given_its_share_within_a_row_after_any_number_of_batches",
    ),
    Fault(
        "the rate with the highest loss is chosen",
        LR_FIND,
        "return min(good, ",
        "return max(good, ",
        f"{OF_LR_FIND}::test_the_choice_is_the_lowest_own_loss_of_what_stayed_finite_and_helped",
    ),
    Fault(
        "rates are scored on what they were trained on",
        LR_FIND,
        "range(steps, steps + count)",
        "range(count)",
        f"{OF_LR_FIND}::test_without_held_out_text_windows_that_no_trial_reads_are_scored",
    ),
    Fault(
        "router biases rise above zero",
        "training/step.py",
        "_project(updates, state.trainable)",
        "updates",
        "tests/training/test_step.py::test_a_step_keeps_router_biases_at_0_or_below",
    ),
    Fault(
        "a bias above zero has no derivative",
        "model/router.py",
        "bias - jax.lax.stop_gradient(jnp.maximum(bias, 0.0))",
        "jnp.minimum(bias, 0.0)",
        "tests/model/test_router.py::test_the_negative_part_passes_every_cotangent",
    ),
    Fault(
        "the router is multiplied in the platform's default precision",
        "model/router.py",
        "precision=EXACT",
        "precision=None",
        f"{OF_PRECISION}::test_in_training_the_router_and_the_logits_are_float32_and_the_rest_is_as_configured",
    ),
    Fault(
        "scores are multiplied in the platform's default precision",
        "evaluate/perplexity.py",
        "@exact\n",
        "",
        f"{OF_PRECISION}::test_all_products_of_scoring_are_float32",
    ),
    Fault(
        "a step runs in float32, whatever its compute dtype",
        "training/step.py",
        "dtype=run.compute_dtype, remat",
        'dtype="float32", remat',
        f"{OF_PRECISION}::test_the_loss_of_a_bfloat16_step_is_the_score_of_its_float32_parameters",
    ),
)
