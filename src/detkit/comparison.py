"""Several models on one test set: numbers with intervals, who really beats whom, and one page to look at."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal, TypeAlias

from detkit.data import Dataset
from detkit.errors import InvalidValue, ProtocolMismatch, UnknownName, UsageError
from detkit.evaluation import ClassMap, Evaluated, Scorable, evaluate_all
from detkit.files import atomic_write
from detkit.job import Model
from detkit.predictor import Predictor
from detkit.runs import Run
from detkit.scores import Scores
from detkit.scores.certainty import FEWEST_IMAGES, LEVEL, NUMBERS, Interval, holm, interval, p_value
from detkit.scores.protocol import plain
from detkit.tables import html_table

Entrant: TypeAlias = "Scorable | Scores"
"""What can be compared: whatever `detkit.evaluate` takes, and scores that are there already."""

ENDINGS = (".html", ".md", ".csv", ".json")
"""Of the files that `Comparison.save` writes."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """By how much one entry is ahead of another, on the same images drawn again and again."""

    first: str
    second: str
    interval: Interval
    """Of the number of `first` less that of `second`; paired, bias-corrected."""
    p_value: float
    """Two-sided; NaN where nothing was measured."""
    corrected_p_value: float
    """The same after Holm's correction for the number of pairs compared."""
    seen_in: str = ""
    """``training`` or ``validation`` where one of the two has seen some of the images and the user allowed it."""

    @property
    def winner(self) -> str | None:
        """The entry that is really ahead: ``corrected_p_value`` under 0.05; else None."""
        if not self.corrected_p_value < 1 - LEVEL:
            return None
        return self.first if self.interval.value > 0 else self.second

    def __str__(self) -> str:
        value, low, high = self.interval.value, self.interval.low, self.interval.high
        mark = f" (SEEN IN {self.seen_in.upper()})" if self.seen_in else ""
        if math.isnan(self.p_value):
            return f"{self.first} and {self.second}: not to be told apart, too little was measured{mark}"
        ahead, behind = (self.first, self.second) if value >= 0 else (self.second, self.first)
        low, high = (low, high) if value >= 0 else (-high, -low)
        numbers = f"{abs(value):.3f} [{low:+.3f}, {high:+.3f}], p = {self.corrected_p_value:.3f}{mark}"
        if self.winner is None:
            return f"{ahead} and {behind}: no difference shown, {numbers}"
        return f"{ahead} beats {behind} by {numbers}"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Comparison:
    """Entries scored by one protocol on the same images."""

    entries: tuple[Evaluated, ...]
    metric: str = "AP"
    """What says who is ahead: AP, AP50 or AP75."""

    def __post_init__(self) -> None:
        _refuse_metric(self.metric)
        names = [entry.name for entry in self.entries]
        if not names or len(set(names)) < len(names):
            raise UsageError(f"a comparison is of one entry or more, each with a name of its own; given: {names}")
        first = self.entries[0]
        for entry in self.entries[1:]:
            differing = _differing(first.scores, entry.scores)
            if differing:
                raise ProtocolMismatch(first.name, entry.name, differing)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> Scores:
        for entry in self.entries:
            if entry.name == name:
                return entry.scores
        raise UnknownName("entry", name, [entry.name for entry in self.entries])

    @property
    def data(self) -> Dataset:
        """The ground truth."""
        return self.entries[0].scores.data

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The numbers that every entry has, those of metric plugins last."""
        return tuple(name for name in self.entries[0].scores if all(name in entry.scores for entry in self.entries))

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """The interval of `metric` for each entry, by name."""
        return {entry.name: entry.scores.interval(self.metric) for entry in self.entries}

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """Every pair of entries, in order."""
        pairs = list(itertools.combinations(self.entries, 2))
        draws = {entry.name: entry.scores.replicates(self.metric) for entry in self.entries}
        values = [a.scores[self.metric] - b.scores[self.metric] for a, b in pairs]
        drawn = [draws[a.name] - draws[b.name] for a, b in pairs]
        p_values = [p_value(value, replicates) for value, replicates in zip(values, drawn, strict=True)]
        return tuple(
            Difference(
                first=a.name,
                second=b.name,
                interval=interval(value, replicates),
                p_value=p,
                corrected_p_value=corrected,
                seen_in=a.scores.seen_in or b.scores.seen_in,
            )
            for (a, b), value, replicates, p, corrected in zip(
                pairs, values, drawn, p_values, holm(p_values), strict=True
            )
        )

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Signs of mistakes, with the name of the entry, and whether the test set is too small."""
        said = [f"{entry.name}: {text}" for entry in self.entries for text in entry.scores.warnings]
        if len(self.data) < FEWEST_IMAGES:
            said.append(
                f"{len(self.data)} image(s) are too few for an interval or a verdict; score {FEWEST_IMAGES} or more"
            )
        return tuple(said)

    def rows(self) -> list[dict[str, Any]]:
        """Return one record of plain values for each entry: name, numbers, the interval's ends, speed, origin."""
        found = []
        for entry in self.entries:
            ends = self.intervals[entry.name]
            row: dict[str, Any] = {"name": entry.name}
            row |= {column: entry.scores[column] for column in self.columns}
            row |= {f"{self.metric}_low": ends.low, f"{self.metric}_high": ends.high}
            speed = entry.seconds_per_image
            row |= {"ms_per_image": None if speed is None else 1000 * speed, "seen_in": entry.scores.seen_in}
            row |= {"start": start_of(entry)}
            found.append({key: plain(value) if isinstance(value, float) else value for key, value in row.items()})
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "metric": self.metric,
            "protocol": asdict(self.entries[0].scores.protocol),
            "entries": [
                {**row, "scores": entry.scores.to_dict(), "facts": facts_of(entry)}
                for row, entry in zip(self.rows(), self.entries, strict=True)
            ],
            "differences": [
                {
                    "first": one.first,
                    "second": one.second,
                    **one.interval.to_dict(),
                    "p_value": plain(one.p_value),
                    "corrected_p_value": plain(one.corrected_p_value),
                    "winner": one.winner,
                }
                for one in self.differences
            ],
            "warnings": list(self.warnings),
        }

    def to_csv(self) -> str:
        """Return the table as CSV: `rows`, with empty cells for what was not measured."""
        rows = self.rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """Return the table, the verdicts and the protocol as Markdown."""
        head, body = self._cells()
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" + "--:|" * (len(head) - 1)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body]
        lines += ["", *(f"- {one}" for one in self.differences), *(f"- warning: {text}" for text in self.warnings)]
        return "\n".join([*lines, "", str(self.entries[0].scores.protocol), ""])

    def to_html(self, path: str | Path, *, title: str = "", command: str = "") -> Path:
        """Write one self-contained page to look at, print and pass on; return its path. Raises `StorageError`.

        ``command`` is told on the page as what makes it again.
        """
        from detkit.report import write_page

        return write_page(self, path, title=title, command=command)

    def save(self, path: str | Path, *, command: str = "") -> Path:
        """Write the page, Markdown, CSV or JSON, as the file's ending says. Raises `InvalidValue`, `StorageError`."""
        import msgspec

        refuse_ending(path)
        target = Path(path)
        if target.suffix == ".html":
            return self.to_html(target, command=command)
        texts = {".md": self.to_markdown, ".csv": self.to_csv}
        content = (
            texts[target.suffix]().encode()
            if target.suffix in texts
            else msgspec.json.format(msgspec.json.encode(self.to_dict()), indent=2)
        )
        with atomic_write(target) as file:
            file.write(content)
        return target

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        shown = [column for column in self.columns if column not in {"AR1", "AR10", "ARs", "ARm", "ARl"}]
        speed = any(entry.seconds_per_image is not None for entry in self.entries)
        head = ["model", *shown, *(["ms/image"] if speed else []), "started from"]
        body = []
        for entry in self.entries:
            mark = f" (SEEN IN {entry.scores.seen_in.upper()})" if entry.scores.seen_in else ""
            row = [entry.name + mark]
            for column in shown:
                value = entry.scores[column]
                text = "-" if math.isnan(value) else f"{value:.3f}"
                if column == self.metric:
                    ends = self.intervals[entry.name]
                    text += f" [{ends.low:.3f}, {ends.high:.3f}]" if not math.isnan(ends.low) else ""
                row.append(text)
            if speed:
                row.append("-" if entry.seconds_per_image is None else f"{1000 * entry.seconds_per_image:.1f}")
            body.append([*row, start_of(entry)])
        return head, body

    def __repr__(self) -> str:
        head, body = self._cells()
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i in {0, len(head) - 1} else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [head, *body]
        ]
        lines += ["", *map(str, self.differences)] if len(self) > 1 else []
        lines += ["", *(f"warning: {text}" for text in self.warnings)] if self.warnings else []
        return "\n".join([*lines, "", str(self.entries[0].scores.protocol)])

    def _repr_html_(self) -> str:
        head, body = self._cells()
        said = "".join(f"<li>{escape(str(one))}</li>" for one in (*self.differences, *self.warnings))
        protocol = escape(str(self.entries[0].scores.protocol))
        return f"{html_table(head, body)}<ul>{said}</ul><p><small>{protocol}</small></p>"


def compare(
    models: Sequence[Entrant] | Mapping[str, Entrant],
    data: Dataset | str | Path | None = None,
    *,
    metric: str = "AP",
    allow_seen: bool = False,
    on_invalid: Literal["raise", "drop"] = "raise",
    max_detections: int | None = None,
    class_map: ClassMap | None = None,
    device: str = "auto",
    batch_size: int = 8,
    fresh: bool = False,
    progress: bool = False,
) -> Comparison:
    """Score models, predictions of other tools, and scores that are there already, on the same images.

    ``models`` may name its entries: ``{"ours": run, "theirs": "results.json"}``; else they are called by their run or
    file. Without ``data`` all are scored on the test images that the runs kept aside, which have to be the same.
    ``max_detections`` is the largest of the models' own where None. The rest is that of `detkit.evaluate`, with its
    errors; ``class_map`` may also be one for each entry, by name. Scores that are there already have to be of the same
    images, classes and limits: else `ProtocolMismatch`.
    """
    _refuse_metric(metric)
    if isinstance(models, (str, Path)):
        raise UsageError(f"compare takes a list of models; write detkit.compare([{str(models)!r}, ...])")
    named = models if isinstance(models, Mapping) else dict(zip(name_entrants(models), models, strict=True))
    if not named:
        raise UsageError("nothing to compare; name runs, models or files of predictions")
    ready = {name: entrant for name, entrant in named.items() if isinstance(entrant, Scores)}
    todo = {name: entrant for name, entrant in named.items() if not isinstance(entrant, Scores)}
    found = {name: Evaluated(name=name, scores=scores) for name, scores in ready.items()}
    if ready and todo:
        first = next(iter(ready.values()))
        data = first.data if data is None else data
        max_detections = max_detections or first.protocol.max_detections
    if todo:
        found |= {
            one.name: one
            for one in evaluate_all(
                todo,
                data,
                allow_seen=allow_seen,
                on_invalid=on_invalid,
                max_detections=max_detections,
                class_map=class_map,
                device=device,
                batch_size=batch_size,
                fresh=fresh,
                progress=progress,
            )
        }
    return Comparison(entries=tuple(found[name] for name in named), metric=metric)


def _refuse_metric(metric: str) -> None:
    if metric not in NUMBERS:
        raise InvalidValue("metric", metric, " or ".join(NUMBERS))


def refuse_ending(path: str | Path) -> None:
    """Raise `InvalidValue` for a file that `Comparison.save` cannot write."""
    if Path(path).suffix not in ENDINGS:
        raise InvalidValue("path", str(path), f"a file name that ends in {', '.join(ENDINGS)}")


def start_of(entry: Evaluated) -> str:
    """Say what a model's weights started from: ``scratch``, ``coco``, ``imagenet``, a file, an earlier model."""
    if entry.model is None:
        return "unknown"
    manifest = entry.model.manifest
    if manifest.parent:
        return "an earlier model"
    return "scratch" if manifest.weights.source in {"none", ""} else manifest.weights.source


def facts_of(entry: Evaluated) -> dict[str, str]:
    """Return what is known of how an entry came to be, in words, by name."""
    if entry.model is None:
        return {"origin": "predictions made elsewhere; whether their maker saw these images is not known"}
    manifest = entry.model.manifest
    facts = {"model": entry.model.name, "started from": start_of(entry)}
    if manifest.weights.licence:
        facts["licence of the weights"] = manifest.weights.licence
    for channel, numbers in manifest.data.items():
        facts[f"{channel} images"] = f"{numbers['images']:,} ({numbers['boxes']:,} boxes)"
    facts["training time"] = f"{manifest.seconds / 60:.1f} min"
    facts["size"] = f"{sum(one.bytes for one in manifest.artifacts.values()) / 1e6:.1f} MB"
    if entry.seconds_per_image is not None:
        facts["time of an image"] = f"{1000 * entry.seconds_per_image:.1f} ms on {entry.device or 'this machine'}"
    for name in ("epochs", "iterations", "batch_size", "learning_rate", "image_size", "seed"):
        if manifest.params.get(name) is not None:
            facts[name] = f"{manifest.params[name]}"
    facts |= {f"{name} version": version for name, version in manifest.versions.items()}
    return facts


def name_entrants(entrants: Iterable[Entrant]) -> list[str]:
    """Return what each is called: its run or file, with a number where two are called the same."""
    names: list[str] = []
    for number, entrant in enumerate(entrants, start=1):
        name = _call(entrant, number)
        candidates = itertools.chain([name], (f"{name} ({n})" for n in itertools.count(2)))
        names.append(next(one for one in candidates if one not in names))
    return names


def _call(entrant: Entrant, number: int) -> str:
    if isinstance(entrant, Predictor):
        entrant = entrant.model
    if isinstance(entrant, Run):
        return entrant.name
    if isinstance(entrant, Model):
        return entrant.path.absolute().parent.name if entrant.path.name == "model" else entrant.path.name
    if isinstance(entrant, (str, Path)):
        return Path(entrant).stem if Path(entrant).is_file() else Path(entrant).name
    return f"{'scores' if isinstance(entrant, Scores) else 'predictions'} {number}"


def _differing(a: Scores, b: Scores) -> dict[str, tuple[str, str]]:
    """Return the parts of two protocols that differ, each in words."""
    found = {}
    for name, value in asdict(a.protocol).items():
        other = asdict(b.protocol)[name]
        if value != other:
            short = (f"{value}"[:40], f"{other}"[:40])
            found[name] = short if short[0] != short[1] else ("one", "another")
    return found
