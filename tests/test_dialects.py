"""Another tool's hyperparameters, from wherever settings come from to the run that they start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from detkit import Dataset, Run, Trainer, plugins
from detkit.backends import LocalBackend
from detkit.dialects import Dialect, Note, becomes, text, typed
from detkit.errors import InvalidValue, UnknownName, UsageError
from detkit.hookspecs import hookimpl
from detkit.params import EmaDecay, LrSchedulerStep, Params, Weights, coerce

pytestmark = pytest.mark.usefixtures("clean")


class OldParams(Params, frozen=True, kw_only=True):
    """The hyperparameters of a tool that counts passes, and has a colour and a shape that nobody else has."""

    passes: Annotated[int, Meta(ge=1)] = 2
    speed: Annotated[float, Meta(gt=0)] = 0.3
    learning_rate: float = 0.5
    colour: str | None = None
    shape: str | None = None
    classes: int | None = None


def translate(params: OldParams, beside: Mapping[str, Any]) -> Sequence[Note]:
    return [
        Note("passes", params.passes, {"epochs": params.passes}),
        Note(
            "learning_rate", params.learning_rate, {"learning_rate": params.learning_rate}, "approximate", "it rounds"
        ),
        Note("speed", params.speed, {"model": "memory"}, "unused", "it is as fast as it is"),
        Note("colour", params.colour, {}, "refused", "echo is grey") if params.colour else Note("colour", None),
        Note("shape", params.shape, {}, "refused", "echo has none") if params.shape else Note("shape", None),
        Note("", None, {"weights": beside.get("weights")}, why="nothing else is known"),
    ]


def check(params: OldParams, channels: Mapping[str, Dataset]) -> Sequence[Note]:
    found = len(channels["train"].classes)
    if params.classes in (None, found):
        return [Note("classes", params.classes, why=f"there are {found} in {', '.join(channels)}")]
    return [Note("classes", params.classes, {}, "refused", f"there are {found}; write classes={found}")]


OLD = Dialect(
    name="old-tool",
    summary="an old tool",
    params=OldParams(),
    translate=translate,
    check=check,
    hints={"tint": "tints have gone"},
)


class Guest:
    """A plugin with the engine of echo, which also understands the old tool."""

    def __init__(self, *names: str) -> None:
        self.names = names

    @hookimpl
    def detkit_backends(self) -> Iterator[LocalBackend]:
        (original,) = plugins.registry().manager.get_plugin("echo").detkit_backends()
        yield from (replace(original, name=name, dialects=(OLD,)) for name in self.names)


@pytest.fixture
def parrot() -> Iterator[None]:
    plugins.registry.cache_clear()
    plugins.registry().manager.register(Guest("parrot"), name="guest")
    yield
    plugins.registry.cache_clear()


def messages(run: Run) -> list[str]:
    return [str(event.values["message"]) for event in run.events(follow=False) if event.kind == "log"]


def params_of(trainer: Trainer, **settings: Any) -> dict[str, Any]:
    return {row.name: row.value for row in trainer.explain(**settings).rows if row.kind == "parameter"}


@pytest.mark.usefixtures("parrot")
class TestLike:
    def test_trains_what_it_says(self, tiny: Dataset) -> None:
        run = Trainer(like="old-tool", passes="3", seed=7).fit(tiny, tiny, quiet=True)
        manifest = run.model.manifest
        assert (manifest.backend, manifest.model) == ("parrot", "memory")
        assert (manifest.params["epochs"], manifest.params["learning_rate"], manifest.params["seed"]) == (3, 0.5, 7)
        told = messages(run)
        assert told[2:5] == [
            "like old-tool, given passes=3; its defaults for the rest",
            "learning_rate=0.5 becomes learning_rate=0.5 (approximate): it rounds",
            "classes: there are 2 in train, validation",
        ]
        (request,) = [event.values for event in run.events(follow=False) if "like" in event.values]
        assert request["like"] == "old-tool"
        assert msgspec.json.decode(str(request["hyperparameters"]), type=OldParams) == OldParams(passes=3)

    def test_unused_is_said_where_it_was_given(self, tiny: Dataset) -> None:
        run = Trainer(like="old-tool", speed=9, passes=1).fit(tiny, tiny, quiet=True)
        assert any("speed=9 becomes model=memory (unused): it is as fast as it is" in line for line in messages(run))

    def test_explained(self) -> None:
        found = Trainer(like="old-tool").explain(passes=3)
        assert (found.backend, found.model, found.like) == ("parrot", "memory", "old-tool")
        passes, rate, *_ = found.notes
        assert (passes.value, passes.becomes, passes.fidelity, passes.origin) == (3, {"epochs": 3}, "exact", "the call")
        assert (rate.fidelity, rate.why, rate.origin) == ("approximate", "it rounds", "default")
        origins = {row.name: row.origin for row in found.rows}
        assert (origins["epochs"], origins["weights"], origins["seed"]) == ("passes", "old-tool", "default")
        assert set(found.to_dict()["hyperparameters"][0]) == {"name", "value", "becomes", "fidelity", "why", "origin"}

    def test_explained_without(self) -> None:
        found = Trainer(model="echo/memory").explain()
        assert (found.like, found.notes, found.to_dict()["hyperparameters"]) == ("", (), [])

    def test_refusals_come_together_and_first(self, tmp_path: Path) -> None:
        trainer = Trainer(like="old-tool", colour="red", shape="round")
        with pytest.raises(UsageError, match=r"(?s)2 hyper.*colour=red: echo is grey\n  shape=round: echo has none"):
            trainer.fit()
        assert [note.name for note in trainer.explain().notes if note.fidelity == "refused"] == ["colour", "shape"]
        assert list(tmp_path.iterdir()) == []

    def test_data_that_contradicts(self, tiny: Dataset, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="classes=5: there are 2; write classes=2"):
            Trainer(like="old-tool", classes=5).fit(tiny, tiny)
        assert list(tmp_path.iterdir()) == []
        Trainer(like="old-tool", classes=2, passes=1).fit(tiny, tiny, quiet=True)

    def test_weights_beside(self, tiny: Dataset) -> None:
        first = Trainer(like="old-tool", passes=1).fit(tiny, tiny, quiet=True)
        for weights in (first, first.path, first.model):
            again = Trainer(like="old-tool", passes=1).fit(tiny, tiny, weights=weights, quiet=True)
            assert again.model.manifest.parent

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"epochs": 4}, r"epochs=4 \(from the call\) contradicts passes=2 in old-tool, which is epochs=2 here"),
            ({"epochs": 4, "passes": 3}, "contradicts passes=3 in old-tool.*leave epochs out, or change passes"),
            ({"iterations": 10}, "iterations=10 .* contradicts passes=2 .*leave iterations out, or change passes"),
            ({"model": "parrot/elephant"}, "model=parrot/elephant .* contradicts speed=0.3 .* model=memory here"),
        ],
    )
    def test_contradictions_name_both(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            Trainer(like="old-tool").explain(**settings)

    def test_every_contradiction_is_named(self) -> None:
        with pytest.raises(UsageError, match="(?s)epochs=4.*model=parrot/elephant"):
            Trainer(like="old-tool").explain(epochs=4, model="parrot/elephant")

    @pytest.mark.parametrize(
        "settings",
        [{"epochs": 2}, {"model": "memory"}, {"model": "parrot/memory"}, {"model": "auto"}, {"backend": "parrot"}],
    )
    def test_saying_the_same_twice_is_no_contradiction(self, settings: dict[str, Any]) -> None:
        assert Trainer(like="old-tool").explain(**settings).model == "memory"

    def test_values_are_checked(self) -> None:
        with pytest.raises(InvalidValue, match=r"passes='0' \(from the call\)"):
            Trainer(like="old-tool").explain(passes="0")
        with pytest.raises(InvalidValue, match="seed='x'"):
            Trainer(like="old-tool").explain(seed="x")

    def test_unknown_names(self) -> None:
        with pytest.raises(UnknownName, match=r"setting of parrot/memory like old-tool.* did you mean 'passes'"):
            Trainer(like="old-tool").explain(pases=3)
        with pytest.raises(UnknownName, match="'tint';.* tints have gone"):
            Trainer(like="old-tool").explain(tint=3)
        with pytest.raises(UnknownName, match="no setting of echo/memory .* 'passes'"):
            Trainer(model="echo/memory").explain(passes=3)

    def test_options_are_options(self) -> None:
        rows = {row.name: row for row in Trainer(like="old-tool", seconds_per_step="0.5").explain().rows}
        assert (rows["seconds_per_step"].value, rows["seconds_per_step"].kind) == (0.5, "option")

    def test_unknown_dialect(self) -> None:
        with pytest.raises(UnknownName, match=r"no dialect 'old-tol'; did you mean 'old-tool'.*by backend 'parrot'"):
            Trainer(like="old-tol").explain()
        for where in ({"backend": "echo"}, {"model": "echo/memory"}):
            with pytest.raises(
                UnknownName, match="no dialect of backend 'echo' 'old-tool'.*offered by backend 'parrot'"
            ):
                Trainer(like="old-tool", **where).explain()

    def test_places_in_order(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "detkit.yaml").write_text("like: old-tool\npasses: 3\nseed: 1\n")
        assert params_of(Trainer())["epochs"] == 3
        monkeypatch.setenv("DETKIT_PASSES", "4")
        assert params_of(Trainer())["epochs"] == 4
        assert params_of(Trainer(passes=5))["epochs"] == 5
        assert params_of(Trainer(passes=5), passes=6)["epochs"] == 6
        assert params_of(Trainer())["seed"] == 1
        (tmp_path / "detkit.yaml").unlink()
        monkeypatch.setenv("DETKIT_LIKE", "old-tool")
        assert params_of(Trainer())["epochs"] == 4


def test_two_backends_that_offer_it() -> None:
    plugins.registry.cache_clear()
    plugins.registry().manager.register(Guest("parrot", "starling"), name="guest")
    try:
        with pytest.raises(
            UsageError, match="'old-tool' is offered by parrot, starling; name one of these with backend="
        ):
            Trainer(like="old-tool").explain()
        assert Trainer(like="old-tool", backend="starling").explain().backend == "starling"
        assert Trainer(like="old-tool", model="parrot/memory").explain().backend == "parrot"
    finally:
        plugins.registry.cache_clear()


def test_notes_together() -> None:
    notes = [Note("a", 1, {"x": 1, "y": 2}), Note("b", None), Note("c", 0, {"y": 3})]
    assert becomes(notes) == {"x": 1, "y": 3}
    assert typed({"x": None, "y": True, "z": (1.5, 2.0), "e": 1e-5}) == "x=none y=true z=1.5,2 e=1e-05"


@given(steps=st.lists(st.integers(0, 10**6)).map(tuple), rate=st.floats(allow_nan=False, allow_infinity=False))
def test_what_is_typed_is_read(steps: tuple[int, ...], rate: float) -> None:
    assert coerce("lr_scheduler_step", text(steps), LrSchedulerStep) == steps
    assert coerce("learning_rate", text(rate), float) == rate
    assert coerce("early_stopping", text(True), bool) is True


def test_numbers_without_a_zero_and_texts_that_begin_like_them() -> None:
    assert coerce("ema_decay", ".9", EmaDecay) == coerce("ema_decay", "0.9", EmaDecay) == 0.9
    assert coerce("learning_rate", "-.5e-3", float) == -0.5e-3
    for words in (".*_weight$", "./weights.pth", ".9"):
        assert coerce("weights", words, Weights) == words
