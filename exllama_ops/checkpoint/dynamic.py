"""The rules of ``dynamic`` and its like: which of them decides for a module, found in bounded time and memory.

The expressions come from a file, and one such as ``(a+)+$x`` takes `re` longer than anybody waits. `regex` matches the
same language under a time limit. It spells repetitions out when it compiles, hence the limits of size. Its clock costs
some ten times an ordinary match, so `re` matches what is plain enough.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from functools import partial

from exllama_ops.checkpoint.errors import CheckpointError, shown
from exllama_ops.extras import require

# Characters of an expression, and of a module's name that is matched against one.
MAX_LENGTH = 1000
# The same with repetitions spelt out. At this size the slowest known expression compiles in 0.7 s.
MAX_SPELT_OUT = 20_000
# Processor time of the process for one match; an ordinary one takes microseconds.
MATCH_SECONDS = 1.0
# Real time for all rules and modules of a checkpoint: hundreds of rules times thousands of modules take seconds.
TOTAL_SECONDS = 30.0

# Text with `.` and `.*`, and how many stars: `re` then takes at most MAX_LENGTH**3 / 6 steps, about a second.
_PLAIN = re.compile(r"(?:[^\\.()\[\]{}|*+?]|\\.|\.\*?)*")
_PLAIN_STARS = 3
# What `regex` reads otherwise than `re`: with the flag x spaces may part a count's digits, a brace that opens no count
# allows errors, and [:alpha:] is a class.
_READ_OTHERWISE = re.compile(r"\(\?[a-zA-Z]*x|\{(?!\d*,?\d*\})|\[:")


def first_matches(rules: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Find the first rule that matches each name from its start.

    Args:
        rules: ``"+:REGEX"``, ``"-:REGEX"`` or ``"REGEX"``, in the language of `re`.
        names: full names of modules; none to check the rules alone.

    Returns:
        Name -> rule, without the names that no rule matches.

    Raises:
        CheckpointError: a rule is no regular expression, or exceeds a limit of size or time; the text names it.
        ImportError: the extra "hf" is not installed.
    """
    end = time.monotonic() + TOTAL_SECONDS
    left = dict.fromkeys(names)
    found: dict[str, str] = {}
    for rule in rules:
        expression = rule[2:] if rule.startswith(("+:", "-:")) else rule
        exact = _exact_name(expression)
        if exact is None:
            match = _compile(rule, expression)
            _check_time(rule, None, end)
            matched = [name for name in left if _matches(rule, match, name, end)]
        else:
            # `$` stands before a newline at the end too.
            matched = [name for name in (exact, f"{exact}\n") if name in left]
        for name in matched:
            found[name] = rule
            del left[name]
    return found


def exact_rule(name: str) -> str:
    """The expression that matches one name alone. It is looked up, so that it has no limit of size or time."""
    return f"^{re.escape(name)}$"


def _exact_name(expression: str) -> str | None:
    """The name that `exact_rule` made the expression of."""
    name = re.sub(r"\\(.)", r"\1", expression[1:-1])
    return name if expression == exact_rule(name) else None


def _compile(rule: str, expression: str) -> Callable[[str], object]:
    """The function that matches a name, or None if it does not; it takes a second at most, or raises TimeoutError."""
    if len(expression) > MAX_LENGTH or _spelt_out(expression) > MAX_SPELT_OUT:
        raise CheckpointError(
            f"rule {shown(rule)}: must have at most {MAX_LENGTH} characters, and {MAX_SPELT_OUT} with its "
            f"repetitions spelt out; got {len(expression)} characters"
        )
    try:
        # For `regex` too, which knows more: recursion takes memory without a limit.
        pattern = re.compile(expression)
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise _no_expression(rule, error) from error
    if _PLAIN.fullmatch(expression) and expression.count("*") <= _PLAIN_STARS:
        return pattern.match
    if found := _READ_OTHERWISE.search(expression):
        raise CheckpointError(
            f"rule {shown(rule)}: must have no flag x, no brace but around a count, and no [:class:]; got "
            f"{found.group()!r}"
        )
    regex = require("regex")
    try:
        timed = regex.compile(expression, regex.V0, cache_pattern=False)
    except (regex.error, ValueError, RecursionError, OverflowError) as error:
        raise _no_expression(rule, error) from error
    return partial(timed.match, timeout=MATCH_SECONDS)


def _no_expression(rule: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"rule {shown(rule)}: must be a regular expression: {error}")


def _spelt_out(expression: str) -> int:
    """A bound for what `regex` compiles: repeating at least n times makes n copies and one for the rest."""
    counts = [int(count) + 1 for count in re.findall(r"\{(\d+)", expression)]
    return len(expression) * math.prod([2] * expression.count("+") + counts)


def _matches(rule: str, match: Callable[[str], object], name: str, end: float) -> bool:
    if len(name) > MAX_LENGTH:
        raise CheckpointError(
            f"rule {shown(rule)}: a module's name must have at most {MAX_LENGTH} characters; got {len(name)}: "
            f"{shown(name)}"
        )
    try:
        matched = match(name)
    except TimeoutError as error:
        raise _too_slow(rule, name) from error
    _check_time(rule, name, end)
    return matched is not None


def _check_time(rule: str, name: str | None, end: float) -> None:
    if time.monotonic() > end:
        raise _too_slow(rule, name)


def _too_slow(rule: str, name: str | None) -> CheckpointError:
    against = "" if name is None else f" against module {shown(name)}"
    return CheckpointError(
        f"rule {shown(rule)}{against}: takes too long: a match has {MATCH_SECONDS:g} s, and all rules and "
        f"modules together have {TOTAL_SECONDS:g} s"
    )
