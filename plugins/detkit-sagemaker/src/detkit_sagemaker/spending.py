"""Nothing that is paid starts without a word."""

from __future__ import annotations

from detkit.errors import UsageError
from detkit.plans import Plan, to_cents
from detkit_sagemaker.options import AccountOptions

_TOLERANCE = 1e-6
"""US dollars, for what floating point adds."""


def approve(plan: Plan, options: AccountOptions) -> None:
    """Raise `UsageError`, with the plan and what to type, unless somebody said that it may cost what it may cost.

    Raises it as well for a plan with errors, which AWS would reject.
    """
    if plan.errors:
        raise UsageError("AWS would reject this; nothing was started:\n" + "\n".join(map(str, plan.errors)))
    if options.yes:
        return
    cost = plan.worst_case_cost
    if options.max_cost is not None and cost is not None and cost <= options.max_cost + _TOLERANCE:
        return
    if options.max_cost is None:
        why = "this costs money, so it is not started without a word"
    elif cost is None:
        why = f"max_cost={options.max_cost:g} cannot be kept, as nobody knows what this costs at most"
    else:
        why = f"this may cost {to_cents(cost):.2f} USD, more than max_cost={options.max_cost:g}"
    enough = "" if cost is None else f"max_cost={to_cents(cost):.2f} (--max-cost {to_cents(cost):.2f}), or "
    raise UsageError(f"{why}:\n{plan.summary()}\nif that is right, say {enough}yes=True (--yes)")
