"""Faults in attacks: what they find must be what is there."""

from tests.sabotage.fault import Fault

OF_ATTACKS = "tests/attack/test_attacks.py"
EXTRACTION, MEMBERSHIP, STATISTICS = "attack/extraction.py", "attack/membership.py", "evaluate/statistics.py"

ATTACKS = (
    Fault(
        "a continuation is compared with itself",
        EXTRACTION,
        "pair = (ids[:length], rows[n][PREFIX:])",
        "pair = (rows[n][PREFIX:], rows[n][PREFIX:])",
        f"{OF_ATTACKS}::test_a_text_known_by_heart_is_extracted_and_one_never_seen_is_not",
    ),
    Fault(
        "the probability of a draw is that of all tokens, not of those that are drawn from",
        STATISTICS,
        "drawn_TV = jax.nn.log_softmax(drawn_from(logits_TV, sampling), axis=-1)",
        "drawn_TV = log_p_TV",
        f"{OF_ATTACKS}::test_the_probability_of_a_draw_is_its_frequency",
    ),
    Fault(
        "n draws have the probability of one",
        EXTRACTION,
        "given = n * np.log1p(-z)",
        "given = np.log1p(-z)",
        f"{OF_ATTACKS}::test_n_draws_and_their_intervals",
    ),
    Fault(
        "every passage is the beginning of a document",
        EXTRACTION,
        "start = int(source.integers(0, max(len(ids) - total, 1)))",
        "start = 0",
        f"{OF_ATTACKS}::test_passages_are_random_places_of_long_documents",
    ),
    Fault(
        "ties count as members found",
        MEMBERSHIP,
        "count = int((scores[:M] > threshold).sum())",
        "count = int((scores[:M] >= threshold).sum())",
        f"{OF_ATTACKS}::test_the_auc_and_its_interval",
    ),
    Fault(
        "the reference is the model itself",
        MEMBERSHIP,
        'found["loss"] - public["loss"]}',
        'found["loss"] - found["loss"]}',
        f"{OF_ATTACKS}::test_members_are_told_from_others_only_by_the_model_that_learned_them",
    ),
    Fault(
        "words alone are not asked",
        "cli/attack.py",
        "    if not blind.is_chance:\n",
        "    if False:\n",
        f"{OF_ATTACKS}::test_the_verbs_say_what_the_functions_find",
    ),
)
