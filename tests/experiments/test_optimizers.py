import dataclasses
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("jraph", reason="needs the quickstart's packages")

from experiments import pronunciations
from experiments.optimizers import ablation, logs, page, report, study, summary, timing
from experiments.optimizers.image_tasks import Images, Reconstruction, load_images
from experiments.optimizers.logs import Log, Run
from experiments.optimizers.methods import METHODS, POINTS, Method, find, split_for_muon
from experiments.optimizers.sequence_tasks import Text, Words
from experiments.optimizers.study import TUNING_SEED
from experiments.optimizers.task import Batch, Length, Task
from experiments.optimizers.tasks import DEFAULT, NAMES, SMALL
from experiments.optimizers.training import Evaluation, Outcome, schedule, train, train_step
from quickstart.errors import QuickstartError
from submission.hyperparameters import Hyperparameters
from submission.schedules import warmup_linear


class Rings(Task):
    """Two classes of points in the plane: inside a circle, or not."""

    name, data, metric, higher_is_better = "rings", "made up", "accuracy", True

    def __init__(self, steps: int = 20) -> None:
        super().__init__(Length(steps, 5, 64), torch.device("cpu"), {})

    def _build_model(self) -> nn.Module:
        layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh())
        layers.add_module("head", nn.Linear(8, 2))
        return layers

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(self.length.batch_size, 2, generator=generator)
            yield {"inputs": x, "targets": (x.square().sum(1) < 1.4).long()}

    def evaluate(self, model: nn.Module) -> float:
        batch = next(self.batches(12345))
        right = self._outputs(model, [batch]).argmax(1) == batch["targets"]
        return float(right.float().mean())


def log(
    method: str, seed: int, metrics: list[float | None], point: int = 0, higher: bool = True
) -> Log:
    evaluations = tuple(
        Evaluation(10 * n, 2.0 * n, value, 0.5) for n, value in enumerate(metrics, 1)
    )
    run = Run("rings", {"data": "made up", "steps": 40, "batch_size": 8}, method,
              METHODS[method].points[point], seed)  # fmt: skip
    return Log(run, "accuracy", higher, Outcome(evaluations, 8.0, None), logs.context())


def test_every_method_has_as_many_points() -> None:
    assert {len(method.points) for method in METHODS.values()} == {POINTS}
    with pytest.raises(ValueError, match="7 distinct points"):
        Method(
            "twice", "", "", (find("soap").points[0], *find("soap").points[:7]), find("soap").build
        )
    with pytest.raises(QuickstartError, match="no method 'adam'; there are: nesterov"):
        find("adam")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name: str) -> None:
    if METHODS[name].source != "submission":
        pytest.importorskip(METHODS[name].source, reason="`./run.sh experiments` installs it")
    task, method = Rings(40), find(name)
    before = task.evaluate(task.make_model(0))
    best = max(
        max((e.metric or 0.0 for e in train(task, method, point, 0).evaluations), default=0.0)
        for point in method.points[1::2]
    )
    assert best > before + 0.05


def test_runs_of_one_seed_are_equal_and_of_two_are_not() -> None:
    task, method = Rings(), find("kfac_reduce_nadamw")
    first, second, other = (train(task, method, method.points[1], seed) for seed in (1, 1, 2))
    losses = [[e.loss for e in outcome.evaluations] for outcome in (first, second, other)]
    assert losses[0] == losses[1] != losses[2]
    assert [e.step for e in first.evaluations] == [5, 10, 15, 20]


def test_a_run_that_diverges_says_so() -> None:
    point = {**find("nesterov").points[0], "learning_rate": 1e38}
    outcome = train(Rings(), find("nesterov"), point, 0)
    assert outcome.problem is not None
    assert "the loss is" in outcome.problem


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    shape = schedule(100)
    factors = [warmup_linear(step, shape) for step in range(101)]
    assert factors[0] == 0
    assert factors[5] == 1 == max(factors)
    assert factors[100] == 0


def test_a_log_comes_back_as_it_was(tmp_path: Path) -> None:
    written = log("soap", 3, [0.5, None, 0.7])
    path = logs.write(tmp_path, written)
    assert logs.read(path) == written
    assert logs.read_all(tmp_path) == [written]
    assert written.best == 0.7
    path.write_text("{}")
    with pytest.raises(QuickstartError, match=r"is damaged .*delete it"):
        logs.read(path)


def test_the_digest_follows_setting_and_point(tmp_path: Path) -> None:
    run = log("soap", 1, [0.5]).run
    others = [
        dataclasses.replace(run, setting={**run.setting, "steps": 41}),
        dataclasses.replace(run, point=METHODS["soap"].points[1]),
        dataclasses.replace(run, seed=2),
        dataclasses.replace(run, method="muon"),
    ]
    assert len({r.path(tmp_path) for r in [run, *others]}) == 5
    again = dataclasses.replace(run, setting=dict(reversed(run.setting.items())))
    assert again.path(tmp_path) == run.path(tmp_path)


def test_a_claimed_run_is_not_done_twice(tmp_path: Path) -> None:
    path = tmp_path / "task" / "run.json"
    with logs.claimed(path) as first, logs.claimed(path) as second:
        assert first
        assert not second
    assert not path.with_suffix(".lock").exists()
    path.write_text("{}")
    with logs.claimed(path) as third:
        assert not third


def small_study(folder: Path, methods: list[str]) -> study.Study:
    return study.Study(folder, [Rings(10)], methods, [1, 2])


def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    plan = small_study(tmp_path, ["nadamw"])
    assert list(plan.after_tuning()) == []
    told: list[Log] = []
    study.do_all(tmp_path, plan.tuning(), lambda n, total, done: told.append(done))
    assert len(told) == POINTS
    assert {done.run.seed for done in told} == {TUNING_SEED}
    study.do_all(tmp_path, plan.tuning(), lambda n, total, done: told.append(done))
    assert len(told) == POINTS
    next(tmp_path.glob("*/*/*.json")).unlink()
    assert len(study.missing(tmp_path, plan.tuning())) == 1
    assert list(plan.after_tuning()) == []
    study.do_all(tmp_path, plan.tuning(), lambda n, total, done: told.append(done))
    best = study.best_of(logs.read_all(tmp_path)).score
    chosen = {json.dumps(dict(run.point)) for _, run in plan.after_tuning()}
    assert len(chosen) == 1
    point = json.loads(chosen.pop())
    assert best == next(d.score for d in logs.read_all(tmp_path) if dict(d.run.point) == point)


def test_page_and_tables_from_a_whole_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = small_study(tmp_path / "runs", ["nadamw", "kfac_reduce_nadamw"])
    for phase in (plan.tuning, plan.after_tuning, plan.ablation):
        study.do_all(plan.folder, phase(), lambda n, total, done: None)
    task = plan.tasks[0]
    points = {
        name: point
        for name in plan.methods
        if (point := study.chosen_point(plan.folder, task, find(name)))
    }
    timing.write(plan.folder, task, points, rounds=2)
    assert [len(s) for s in timing.read(plan.folder, task.name, task.setting).values()] == [2, 2]
    assert timing.read(plan.folder, task.name, {"steps": 1}) == {}

    assert page.main(["--folder", str(plan.folder), "--docs", str(tmp_path / "docs")]) == 0
    assert capsys.readouterr().out.strip().endswith("optimizers.md")
    assert "optimizers_tables.md" in (tmp_path / "docs" / "optimizers.md").read_text()
    text = (tmp_path / "docs" / "optimizers_tables.md").read_text()
    assert "which the worst seed of tuned NAdamW just reaches" in text
    assert "K-FAC-reduce, NAdamW" in text
    assert "one setting of K-FAC-reduce, NAdamW changed at a time" in text
    assert "not run: Nesterov, Schedule-free AdamW, SOAP, KL-SOAP, Muon, Shampoo" in text
    assert "(chosen)" in text
    assert (tmp_path / "docs" / "pictures" / "optimizers.png").stat().st_size > 1000
    with pytest.raises(QuickstartError, match="no logs in"):
        page.main(["--folder", str(tmp_path / "empty"), "--docs", str(tmp_path)])


def test_the_overview_has_each_methods_steps_as_multiples_of_soaps(tmp_path: Path) -> None:
    soap = [log("soap", seed, [0.1, 0.5, 0.9]) for seed in (1, 2)]
    ours = [log("kfac_reduce_polar", seed, [0.4, 0.9]) for seed in (1, 2)]
    task = summary.TaskLogs("rings", soap[0].run.setting, "accuracy", True, {},
                            {"soap": soap, "kfac_reduce_polar": ours}, {}, [],
                            [log("soap", 1, [0.2, 0.9])])  # fmt: skip
    timing.path(tmp_path, "rings").parent.mkdir()
    measured = {"soap": [1.0, 2.0], "kfac_reduce_polar": [1.2, 2.4]}
    timing.path(tmp_path, "rings").write_text(
        json.dumps({"setting": dict(task.setting), "seconds_per_step": measured})
    )
    steps, seconds, best = report.overview([task], tmp_path)
    assert [row[1] for row in steps.rows] == ["1.00 ± 0.00", "0.67 ± 0.00", "0.67"]
    assert [row[1] for row in seconds.rows] == ["1.00 ± 0.00", "0.80 ± 0.00", "0.80"]
    assert [row[1] for row in best.rows] == ["0.900 ± 0.000", "0.900 ± 0.000", "0.900"]
    assert best.rows[2][0] == "K-FAC-reduce, polar factor, one setting for all"
    assert steps.header == seconds.header == ("method", "rings, 40 steps")
    assert summary.product((2.0, 0.1), (3.0, 0.2)) == (6.0, pytest.approx(0.5))


def test_targets_steps_and_ratios() -> None:
    reference = [log("nadamw", 1, [0.1, 0.2, 0.6, 0.5]), log("nadamw", 2, [0.3, 0.5, 0.5, 0.7])]
    target = summary.target_of(reference)
    assert target == 0.6
    own = summary.reached(reference, target)
    assert own.all_did
    assert own.steps == [30.0, 40.0]
    assert own.seconds == [6.0, 8.0]
    ours = summary.reached([log("soap", 1, [0.6, 0.9]), log("soap", 2, [0.1, 0.5])], target)
    assert not ours.all_did
    assert ours.steps == [10.0]
    assert summary.mean_ratio([10.0, 20.0], own.steps) == pytest.approx((15 / 35, 0.1564), abs=1e-3)


def test_a_lower_metric_can_be_the_better_one() -> None:
    lower = [log("nadamw", seed, values, higher=False)
             for seed, values in ((1, [3.0, 2.0, 1.5]), (2, [3.0, 1.8, 1.7]))]  # fmt: skip
    assert [entry.best for entry in lower] == [1.5, 1.7]
    assert summary.target_of(lower) == 1.7
    assert summary.reached(lower, 1.7).steps == [30.0, 30.0]
    assert study.best_of(lower) is lower[0]


def test_incomplete_tuning_is_not_reported() -> None:
    one_short = [log("nadamw", TUNING_SEED, [0.5], point) for point in range(POINTS - 1)]
    assert summary.group([*one_short, log("nadamw", 1, [0.5])])[0].seeds == {}
    later = [log("nadamw", TUNING_SEED, [0.9], 7), log("nadamw", 1, [0.5], 7)]
    whole = summary.group([*one_short, *later, log("nadamw", 1, [0.8], 0)])[0]
    assert [entry.run.point for entry in whole.seeds["nadamw"]] == [METHODS["nadamw"].points[7]]
    assert len(report.tuning(whole)[0].rows) == POINTS


def test_a_setting_carries_over_where_it_is_best_on_every_task() -> None:
    tasks = []
    for best in (1, 1):
        tuned = [log("nadamw", TUNING_SEED, [0.5, 0.9 if p == best else 0.6], p)
                 for p in range(POINTS)]  # fmt: skip
        ours = [log("kfac_reduce_nadamw", TUNING_SEED, [0.95 if p == best else 0.5, 0.91], p)
                for p in range(POINTS)]  # fmt: skip
        tasks.append(summary.group([*tuned, *ours])[0])
    tasks[1] = dataclasses.replace(tasks[1], task="other")
    first = summary.carried_over(tasks, ["kfac_reduce_nadamw"])[0]
    assert first.point == METHODS["kfac_reduce_nadamw"].points[1]
    assert first.slowdown == {"rings, 40 steps": 1.0, "other, 40 steps": 1.0}
    assert first.loss == {"rings, 40 steps": 0.0, "other, 40 steps": 0.0}
    label = report.carrying(tasks)[0].rows[0][0]
    assert label.startswith("K-FAC-reduce, NAdamW, learning_rate 0.001")


@pytest.mark.parametrize("method", ablation.CHANGES)
def test_each_change_of_the_ablation_changes_the_base(method: str) -> None:
    base = METHODS[method].points[0]
    found = list(ablation.changes(method, base))
    points = [json.dumps(dict(change.point), sort_keys=True) for change in found]
    assert len(set(points)) == len(points) > 10
    assert found[0].point == base
    for change in found:
        Hyperparameters.from_tuning_point(change.point).kfac_config(seed=0)
    names = {what for what, _ in ablation.CHANGES[method]}
    assert set(ablation.base_values(method, base)) == names - {"eigenvalues"}


def test_muon_gets_hidden_matrices_only() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model.add_module("head", nn.Linear(4, 2))
    muon, adam = split_for_muon(model, "head")
    assert [id(p) for p in muon] == [id(model[1].weight)]
    assert len(adam) == len(list(model.parameters())) - 1


def test_text_and_images_as_tasks() -> None:
    content = "in the beginning was the word, and the word was with us. " * 40
    text = Text(Length(2, 1, 4), torch.device("cpu"), content, SMALL.text)
    batch = next(text.batches(1))
    assert batch["inputs"].shape == batch["targets"].shape == (4, SMALL.text.window)
    assert torch.equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    untrained = text.evaluate(text.make_model(1))
    assert untrained == pytest.approx(np.log(len(set(content))), abs=0.2)

    pytest.importorskip("sklearn", reason="needs the quickstart's packages")
    data = load_images(None, 16, 100, 50)

    def build(channels: int, side: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * side**2, 10))

    images = Images("vit", Length(2, 1, 8), torch.device("cpu"), data, {"width": 3}, build)
    assert images.setting["validation_images"] == len(data.splits["validation"])
    assert 0 <= images.evaluate(images.make_model(0)) <= 1


def test_reconstruction_from_a_part_of_the_spectrum() -> None:
    pytest.importorskip("sklearn", reason="needs the quickstart's packages")
    data = load_images(None, 8, 100, 50)
    task = Reconstruction(Length(30, 10, 16), torch.device("cpu"), data, width=4, levels=2)
    batch = next(task.batches(1))
    assert batch["inputs"].shape == batch["targets"].shape == (16, 8, 8)
    assert batch["inputs"].mean((1, 2)).abs().max() < 1e-5
    spectrum = torch.fft.fft2(task._from_part(torch.ones(3, 8, 8)))
    assert torch.allclose(spectrum[:, 0, 0], torch.full((3,), 64 + 0j))  # the mean is always kept
    assert task.loss(batch["targets"], batch) == 0
    pytest.importorskip("torchmetrics", reason="`./run.sh experiments` installs it")
    method = find("kfac_reduce_polar")
    first, *_, last = train(task, method, method.points[2], 1).evaluations
    assert first.metric is not None
    assert last.metric is not None
    assert 0 < first.metric < last.metric < 1


def make_words(folder: Path, lines: str) -> Path:
    path = folder / "words.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(pronunciations.MEMBER, lines)
    return path


def test_words_and_their_phonemes(tmp_path: Path) -> None:
    lines = "abc EY1 B IY0 # a comment\nabc(2) AA1\nd' D\ntoolongtobetaken T\ncab K AE1 B\n"
    found = pronunciations.read(make_words(tmp_path, lines), 3, 14)
    assert found.letters == ["a", "b", "c"]
    assert found.phonemes == ["", "AE", "B", "EY", "IY", "K"]
    assert found.words == [([0, 1, 2], [3, 2, 4]), ([2, 0, 1], [5, 1, 2])]
    (tmp_path / "words.whl").write_bytes(b"no wheel")
    with pytest.raises(QuickstartError, match="is damaged"):
        pronunciations.read(tmp_path / "words.whl", 3, 14)


def test_the_lstms_learn_from_a_loss_without_labels_of_frames(tmp_path: Path) -> None:
    letters = "abcdefgh"
    words = sorted({"".join(np.random.default_rng(n).choice(list(letters), 4)) for n in range(300)})
    lines = "".join(f"{word} {' '.join(word.upper())}\n" for word in words)
    content = pronunciations.read(make_words(tmp_path, lines), 3, 14)
    task = Words(
        Length(60, 20, 32), torch.device("cpu"), content, width=16, depth=1, validation_words=20
    )
    batch = next(task.batches(1))
    logits = task.make_model(0)(batch["inputs"])
    assert logits.shape == (32, 8, 9)
    one = torch.nn.functional.ctc_loss(
        logits[0].log_softmax(-1), batch["targets"][:4], (8,), (4,), reduction="sum"
    )
    rest = {**batch, "targets": batch["targets"][4:], "target_lengths": batch["target_lengths"][1:]}
    whole = task.loss(logits, batch) * 256
    assert torch.allclose(whole, one + task.loss(logits[1:], rest) * 248)
    method = find("kfac_reduce_polar")
    first, *_, last = train(task, method, method.points[4], 1).evaluations
    assert last.metric is not None
    assert first.metric is not None
    assert last.metric < 0.8 * first.metric


def test_a_schedule_free_run_evaluates_averages() -> None:
    pytest.importorskip("pytorch_optimizer", reason="`./run.sh experiments` installs it")
    task, method = Rings(20), find("schedule_free")
    model = task.make_model(0)
    stepper = method.build(model, task, method.points[4], 0)
    batches = iter(task.batches(0))
    for _ in range(5):
        train_step(task, model, stepper, next(batches))
    before = [p.clone() for p in model.parameters()]
    with stepper.evaluating():
        assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for p, b in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, b)


@pytest.mark.parametrize("name", NAMES)
def test_every_task_has_its_length(name: str) -> None:
    assert name in DEFAULT.lengths
    assert name in SMALL.lengths


def test_logs_are_packed_and_taken_over(tmp_path: Path) -> None:
    first, second, archive = tmp_path / "first", tmp_path / "second", tmp_path / "runs.jsonl.gz"
    for seed in (1, 2):
        logs.write(first, log("nadamw", seed, [0.5, 0.6]))
    assert logs.pack(first, archive) == 2
    packed = archive.read_bytes()
    assert logs.pack(first, archive) == 2
    assert archive.read_bytes() == packed
    assert logs.unpack(archive, second) == 2
    assert logs.unpack(archive, second) == 0
    assert logs.read_all(second) == logs.read_all(first)
    archive.write_bytes(b"no archive")
    with pytest.raises(QuickstartError, match="cannot be read"):
        logs.unpack(archive, second)
