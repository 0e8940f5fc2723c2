"""``detkit models``."""

from typing import Annotated

import typer

from detkit.cli import messages
from detkit.cli.runs import Json


def models(
    backend: Annotated[str | None, typer.Option(metavar="BACKEND", help="Only the models of this one.")] = None,
    as_json: Json = False,
) -> None:
    """List the models that can be trained here, and the weights each can start from."""
    from detkit import plugins
    from detkit.cli.backends import missing

    chosen = [plugins.backend(backend)] if backend else list(plugins.backends().values())
    records = [
        {
            "model": f"{one.name}/{name}",
            "backend": one.name,
            "summary": spec.summary,
            "weights": list(spec.weights),
            "licence": spec.licence,
            "missing": missing(one),
        }
        for one in chosen
        for name, spec in one.models.items()
    ]
    if as_json:
        messages.print_json(records)
        return
    if not records:
        print("no backend is installed; for example: pip install detkit-torchvision")
        return
    messages.print_table(
        ("model", "weights", "needs", "summary"),
        [(r["model"], ", ".join(r["weights"]) or "none", ", ".join(r["missing"]), r["summary"]) for r in records],
    )
