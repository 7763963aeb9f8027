"""``sama-kernels weigh``: reads the files, trains, scores every row, writes the weights."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..common.batches import one_epoch
from ..common.checkpoints import Checkpoint
from ..common.encoder import PretrainedEncoder, default_model_folder
from ..common.errors import ExperimentError
from ..common.processes import choose_device
from ..common.progress import ProgressBars
from ..common.records import machine, versions
from . import weights_file
from .formats import digest, open_rows, out_file
from .index import BadRows, CleanSet, RowIndex, read_clean
from .learner import Learner
from .options import WeighOptions
from .rows import Record
from .scores import Scores

SCORED_TOGETHER = 8  # batches whose texts are read together and sorted by length in the last pass


@dataclass(frozen=True)
class Files:
    """The user's files, read through once."""

    train: RowIndex
    clean: CleanSet
    bad: dict[str, Counter[str]]
    in_both: int


def weigh(options: WeighOptions, console: Console) -> None:
    """Weigh the rows of ``--train``; prints a summary and writes ``--out`` and the files beside it."""
    started = time.perf_counter()
    out = out_file("--out", Path(options.out))
    weights_file.check_name("--out", out)
    train, clean = Path(options.train), Path(options.clean)
    for flag, path in (("--train", train), ("--clean", clean)):
        open_rows(flag, path, options.text, options.label)
        for written in (out, bad_rows_file(out), weights_file.summary_file(out), weights_file.partial_file(out)):
            if written.resolve() == path.resolve():
                beside = "is" if written == out else f"{written}, which is written beside it, is"
                raise ExperimentError(f"--out {out}: {beside} the file of {flag}; name another one")
    digests = {"train": digest(train), "clean": digest(clean)}
    if digests["train"] == digests["clean"]:
        raise ExperimentError(
            f"--clean {clean}: has the same content as --train; the clean set must be other rows, with trusted labels"
        )
    device = choose_device(options.device)
    folder = default_model_folder() if options.model is None else Path(options.model)
    encoder = PretrainedEncoder(folder, options.train_layers, options.max_tokens, device)
    with working_folder(out) as work, ProgressBars(console, 3) as progress:
        settings = _settings(options, digests, folder)
        checkpoint = Checkpoint(work, settings, options.restart)
        if checkpoint.resumed:
            progress.print("going on from the checkpoint of a run that did not end")
        files = _read(options, bad_rows_file(out), work / "texts.jsonl", progress)
        progress.run_done()
        work_on = Weighing(options, encoder, files, checkpoint, progress)
        work_on.train()
        progress.run_done()
        work_on.score()
        progress.run_done()
        summary = _write(out, options, files, work_on.scores, work_on.clean_scores)
        summary |= {"settings": settings, "seconds": time.perf_counter() - started}
        weights_file.write_summary(out, {**summary, "machine": machine(), "versions": versions()})
        checkpoint.remove()
    _print(console, out, summary)


class Weighing:
    """The training and the last pass, with checkpoints."""

    def __init__(
        self,
        options: WeighOptions,
        encoder: PretrainedEncoder,
        files: Files,
        checkpoint: Checkpoint,
        progress: ProgressBars,
    ) -> None:
        self.options = options
        self.settings = options.settings
        self.rows = files.train
        self.checkpoint = checkpoint
        self.progress = progress
        self.epoch_steps = math.ceil(len(self.rows) / self.settings.batch)
        self.steps = self.settings.epochs * self.epoch_steps
        self.learner = Learner(encoder, files.clean, self.settings, self.steps)
        self.scores = Scores(len(self.rows))
        self.clean_scores = Scores(len(files.clean.texts))
        self.scored = 0
        state = checkpoint.state("weigh")
        if state is not None:
            self.learner.load(state["learner"])
            self.scores.load(state["scores"])
            self.clean_scores.load(state["clean scores"])
            self.scored = state["scored"]

    def train(self) -> None:
        """All epochs, from where the checkpoint left them."""
        done = self.learner.step_count
        self.progress.stage("training", self.steps)
        self.progress.advance(done)
        for epoch in range(done // self.epoch_steps, self.settings.epochs):
            first = epoch * self.epoch_steps
            for step, places in enumerate(self._batches(epoch), start=first):
                if step < done:
                    continue
                batch = self.learner.batch(self.rows.texts(places), self.rows.labels[places])
                judgement = self.learner.step(batch)
                if epoch == self.settings.epochs - 1:
                    self.scores.add(places, judgement, batch.labels)
                    if step == first + self.epoch_steps // 2:
                        self._look_at_clean(last=False)
                self.progress.advance()
                if (step + 1) % self.options.checkpoint_every == 0:
                    self._save()
        self._save()

    def score(self) -> None:
        """One pass of the final model over all rows, in the order of the file."""
        self.progress.stage("scoring", len(self.rows))
        self.progress.advance(self.scored)
        if self.scored == 0:
            self._look_at_clean(last=True)
        group = SCORED_TOGETHER * self.settings.batch
        since_saved = 0
        for start in range(self.scored, len(self.rows), group):
            together = torch.arange(start, min(start + group, len(self.rows)))
            by_length = together[self.rows.lengths[together].argsort(stable=True)]
            for places in torch.split(by_length, self.settings.batch):
                batch = self.learner.batch(self.rows.texts(places), self.rows.labels[places])
                judgement = self.learner.judge(batch)
                self.scores.finish(places, judgement, batch.labels)
                self.progress.advance(len(places))
            self.scored = start + len(together)
            since_saved += SCORED_TOGETHER
            if since_saved >= self.options.checkpoint_every:
                self._save()
                since_saved = 0

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        """The places of the good rows in an order that only the seed and the number of the epoch decide."""
        generator = torch.Generator().manual_seed(self.settings.seed * 100_003 + epoch)
        everything = torch.arange(len(self.rows))
        return one_epoch(everything, self.rows.lengths, self.settings.batch, generator, keep_rest=True)

    def _look_at_clean(self, last: bool) -> None:
        """The clean rows are scored as often as the others: their labels are right, so they show what that looks like.

        In the middle of an epoch, the time at which training comes by the other rows on average.
        """
        for places in torch.split(torch.arange(len(self.clean_scores)), self.settings.batch):
            batch = self.learner.clean_batch(places)
            judgement = self.learner.judge(batch)
            if last:
                self.clean_scores.finish(places, judgement, batch.labels)
            else:
                self.clean_scores.add(places, judgement, batch.labels)

    def _save(self) -> None:
        state = {"learner": self.learner.state(), "scores": self.scores.state(), "scored": self.scored}
        self.checkpoint.save("weigh", {**state, "clean scores": self.clean_scores.state()})


def bad_rows_file(out: Path) -> Path:
    """Where the bad rows are listed."""
    return Path(f"{out}.bad_rows.jsonl")


@contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """A folder beside the output for checkpoint and copied texts; it stays only where the work was not finished."""
    folder = Path(f"{out}.unfinished")
    if folder.exists() and not folder.is_dir():
        raise ExperimentError(
            f"--out {out}: {folder} is for checkpoints, but there is a file of this name; move it away"
        )
    folder.mkdir(exist_ok=True)
    spool = folder / "texts.jsonl"
    try:
        yield folder
    finally:
        spool.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _settings(options: WeighOptions, digests: dict[str, str], folder: Path) -> dict[str, Any]:
    """All that the results depend on."""
    named = {name: getattr(options, name) for name in ("text", "label", "train_layers", "max_tokens", "false_alarms")}
    return {**named, **asdict(options.settings), **digests, "model": str(folder.resolve())}


def _read(options: WeighOptions, bad_rows: Path, spool: Path, progress: ProgressBars) -> Files:
    train, clean = Path(options.train), Path(options.clean)
    with open(bad_rows, "w", encoding="utf-8") as listed:
        bad = BadRows(listed)
        trusted = read_clean(open_rows("--clean", clean, options.text, options.label), bad)
        known = set(trusted.texts)
        in_both = 0

        def look(record: Record) -> None:
            nonlocal in_both
            in_both += record.text in known

        progress.stage("reading the rows", 0)
        rows = open_rows("--train", train, options.text, options.label)
        index = RowIndex(rows, trusted.classes, bad, spool, look, progress.advance)
    return Files(index, trusted, {"train": bad.of(train), "clean": bad.of(clean)}, in_both)


def _write(out: Path, options: WeighOptions, files: Files, scores: Scores, clean_scores: Scores) -> dict[str, Any]:
    """Write the weights; returns the summary."""
    if not (scores.loss.isfinite().all() and scores.relative_weight().isfinite().all()):
        raise ExperimentError(
            f"--lr {options.settings.lr:g}, --meta-lr {options.settings.meta_lr:g}: the training diverged (losses or"
            " weights are not finite), and nothing was written; try smaller ones, with --restart"
        )
    suspicion = scores.suspicion()
    differs = scores.proposed != files.train.labels
    threshold = clean_scores.suspicion().quantile(1 - options.false_alarms).item()
    suspected = differs & (suspicion > threshold)
    weights = scores.relative_weight()
    columns = {
        "row": files.train.rows,
        "label": files.train.labels,
        "weight": weights,
        "suspicion": suspicion,
        "suspected": suspected,
        "proposed_label": scores.proposed,
        "confidence": scores.confidence,
        "loss": scores.loss,
    }
    if options.settings.correct:
        columns["corrected_label"] = scores.corrected
    weights_file.write(out, files.clean.classes, columns)
    return {
        "train": options.train,
        "clean": options.clean,
        "text": options.text,
        "label": options.label,
        "classes": files.clean.classes,
        "rows": files.train.total,
        "weighed_rows": len(files.train),
        "clean_rows": len(files.clean.texts),
        "rows_also_in_clean": files.in_both,
        "bad_rows": {name: dict(counts.most_common()) for name, counts in files.bad.items()},
        "bad_rows_file": str(bad_rows_file(out)),
        "suspected_rows": int(suspected.sum()),
        "suspicion_threshold": threshold,
        "corrected_rows": int((scores.corrected != files.train.labels).sum()),
    }


def _print(console: Console, out: Path, summary: dict[str, Any]) -> None:
    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    say(f"{summary['weighed_rows']} of {summary['rows']} rows weighed, {summary['clean_rows']} clean rows")
    for name, counts in summary["bad_rows"].items():
        if counts:
            listed = json.dumps(counts, ensure_ascii=False)[1:-1]
            say(f"{sum(counts.values())} bad rows in --{name} ({listed}), listed in {bad_rows_file(out)}")
    if summary["rows_also_in_clean"]:
        say(f"{summary['rows_also_in_clean']} rows have a text that is in --clean too")
    say(f"{summary['suspected_rows']} suspected label errors (suspicion above {summary['suspicion_threshold']:.3f})")
    if summary["settings"]["correct"]:
        say(f"{summary['corrected_rows']} corrected labels differ from the given ones")
    say(f"{summary['seconds']:.0f} s; wrote {out}")
