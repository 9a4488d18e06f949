"""Faults in experts that are low-rank changes: training, loading, tuning, compressing, rebasing, exporting."""

from tests.sabotage.fault import Fault

OF_MODEL, OF_KINDS = "tests/model/test_low_rank.py", "tests/compose/test_low_rank.py"
OF_CONVERT, OF_QUANTIZED = "tests/compose/test_convert.py", "tests/training/test_quantized.py"
EXPERTS, CONVERT = "model/experts.py", "compose/convert.py"

SHAPES = (
    Fault(
        "frozen matrices of one block for a whole row",
        "model/quantized.py",
        "block = math.gcd(BLOCK, x.shape[last])",
        "block = x.shape[last]",
        f"{OF_QUANTIZED}::test_every_weight_is_within_half_a_step_of_its_block",
    ),
    Fault(
        "a low-rank change is added to the public matrix without the scales of its blocks",
        EXPERTS,
        "return (as_weight(w, jnp.float32) + matmul(a, b, jnp.float32)).astype(like.dtype)",
        'w = getattr(w, "qvalue", w)\n'
        "        return (as_weight(w, jnp.float32) + matmul(a, b, jnp.float32)).astype(like.dtype)",
        f"{OF_QUANTIZED}::test_a_step_is_that_of_the_matrices_the_blocks_stand_for",
    ),
    Fault(
        "the trunk is not quantized",
        "training/state.py",
        "if not (run.frozen_dtype and is_matrix(path_text(path))):",
        "if not (run.frozen_dtype and is_matrix(path_text(path)) and path[0].key == 'experts'):",
        f"{OF_QUANTIZED}::test_a_step_is_that_of_the_matrices_the_blocks_stand_for",
    ),
    Fault(
        "four bits are planned as eight",
        "plan/work.py",
        "itemsize = 0.5 if leaf.dtype == jnp.uint4 else leaf.dtype.itemsize",
        "itemsize = leaf.dtype.itemsize",
        "tests/test_experiments.py::test_a_7b_expert_that_is_a_low_rank_change_fits_one_card",
    ),
    Fault(
        "a public run quantizes what it trains",
        "config.py",
        'Kind.PUBLIC: ("expert", "router_contrast", "bias_init", "rank", "frozen_dtype"),',
        'Kind.PUBLIC: ("expert", "router_contrast", "bias_init", "rank"),',
        f"{OF_QUANTIZED}::test_only_owners_runs_quantize_and_not_on_an_expert_axis",
    ),
    Fault(
        "a low-rank change does not begin at zero",
        "params.py",
        "leaves[b] = Leaf((L, rank, outputs), (None, None, split_out))",
        "leaves[b] = Leaf((L, rank, outputs), (None, None, split_out), std=0.02)",
        f"{OF_KINDS}::test_training_starts_as_the_public_expert",
    ),
    Fault(
        "the derivative of a low-rank change is taken at the public matrices alone",
        EXPERTS,
        "_ffn_bwd_rows((bits, _whole(matrices, dy_ND), *projections), dy_ND)",
        "_ffn_bwd_rows((bits, tuple(m[0] for m in matrices), *projections), dy_ND)",
        f"{OF_MODEL}::test_gradients_are_those_of_automatic_differentiation_and_that_of_the_public_matrix_is_not_taken",
    ),
    Fault(
        "a training step keeps the whole matrices of a low-rank change",
        EXPERTS,
        "return y_ND, (bits, matrices, projections)",
        "return y_ND, (bits, tuple((w,) for w in _whole(matrices, x_ND)), projections)",
        f"{OF_MODEL}::test_the_derivative_keeps_no_matrix",
    ),
    Fault(
        "a low-rank change is loaded without the public matrix",
        "artifacts/low_rank.py",
        "            whole += np.asarray(public[layers, rows, columns], np.float32)\n",
        "",
        f"{OF_KINDS}::test_what_was_trained_is_what_the_merged_model_runs",
    ),
    Fault(
        "a change of a higher rank than the matrix is accepted",
        "artifacts/manifest.py",
        "if rank > most:",
        "if rank > 10**9:",
        f"{OF_KINDS}::test_a_change_that_is_not_whole_is_refused",
    ),
    Fault(
        "router tuning trains low-rank changes",
        "compose/tune.py",
        "experts/.*/w_.*",
        "experts/.*/w_(gate|up|down)",
        f"{OF_KINDS}::test_a_low_rank_expert_is_trained_further_and_its_router_tuned_in_its_own_form",
    ),
    Fault(
        "compressing keeps the smallest singular values",
        CONVERT,
        "root_r = np.sqrt(s_m[:rank])",
        "root_r = np.sqrt(s_m[-rank:])",
        f"{OF_CONVERT}::test_compressing_keeps_the_largest_part_of_the_change_and_says_what_that_costs",
    ),
    Fault(
        "the score before compressing is that after it",
        CONVERT,
        "[score(whole_expert(manifest.owner, leaves, theirs)) for leaves in (expert, made)]",
        "[score(whole_expert(manifest.owner, leaves, theirs)) for leaves in (made, made)]",
        f"{OF_CONVERT}::test_compressing_keeps_the_largest_part_of_the_change_and_says_what_that_costs",
    ),
    Fault(
        "a rebased expert is the old one",
        CONVERT,
        "np.asarray(expert[name], np.float32) + step)",
        "np.asarray(expert[name], np.float32) + 0 * step)",
        f"{OF_CONVERT}::test_a_rebased_expert_is_the_new_public_one_with_the_owners_change",
    ),
    Fault(
        "a rebased expert keeps its base",
        CONVERT,
        "config=manifest.config, base=base, record=record",
        "config=manifest.config, base=manifest.base, record=record",
        f"{OF_CONVERT}::test_a_rebased_expert_is_the_new_public_one_with_the_owners_change",
    ),
    Fault(
        "an export does not check the factors of a change",
        "hf/export.py",
        "expert = load_package(model.package(name), digest=model.manifests[name].digest, mapped=True)",
        "expert = load_package(model.package(name), verify=False, mapped=True)",
        f"{OF_KINDS}::test_exports_hold_the_matrices_added_up",
    ),
    Fault(
        "a change that adds up to infinity is merged",
        "compose/merge.py",
        "        check_sums(manifest.owner, *parts)\n",
        "        tuple(parts)\n",
        f"{OF_KINDS}::test_finite_factors_of_a_change_that_is_not_finite_are_refused_everywhere",
    ),
    Fault(
        "a model with a change that adds up to infinity is loaded",
        "artifacts/low_rank.py",
        "if not np.isfinite(whole).all():",
        "if np.isnan(whole).all():",
        f"{OF_KINDS}::test_finite_factors_of_a_change_that_is_not_finite_are_refused_everywhere",
    ),
    Fault(
        "all owners of a seed draw the same factors",
        "training/start.py",
        "np.random.default_rng((run.seed, n, *run.owner.encode()))",
        "np.random.default_rng((run.seed, n))",
        f"{OF_KINDS}::test_nobody_draws_what_another_owner_draws_and_frozen_factors_are_nobodys_data",
    ),
    Fault(
        "an import forgets whose data tuned an expert that was exported in another form",
        "hf/load.py",
        '**({"tuned": tuned} if tuned else {})',
        "**{}",
        f"{OF_KINDS}::test_exports_hold_the_matrices_added_up",
    ),
    Fault(
        "an expert is rebased into another space of router rows",
        CONVERT,
        '("encoder_digest", "scale", "projection_seed")',
        '("encoder_digest", "scale")',
        f"{OF_CONVERT}::test_compressing_and_rebasing_refuse_what_does_not_belong",
    ),
    Fault(
        "zeros that two owners have count as one's data in the other",
        "compose/certificate.py",
        "if sha256 in tensors and not _repeats(opened.path / file)",
        "if sha256 in tensors",
        f"{OF_KINDS}::test_nobody_draws_what_another_owner_draws_and_frozen_factors_are_nobodys_data",
    ),
)
