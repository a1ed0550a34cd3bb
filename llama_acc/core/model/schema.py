"""The numbers that shapes of models are made of, and how a mapping of a file becomes a dataclass of them."""

import functools
from collections.abc import Mapping
from inspect import signature
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from llama_acc.core.errors import UserError, did_you_mean, listed, schema_problems

# Beyond these bounds is no model: a larger number is a slip, and would be waited for.
WIDEST = 2**20


def whole(value: Any) -> Any:
    """JSON's 64.0 as 64."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Depth = Annotated[int, BeforeValidator(whole), Field(strict=True, ge=1, le=2**10)]
Heads = Annotated[int, BeforeValidator(whole), Field(strict=True, ge=1, le=2**12)]
Width = Annotated[int, BeforeValidator(whole), Field(strict=True, ge=1, le=WIDEST)]
Epsilon = Annotated[float, Field(strict=True, ge=1e-30, le=1.0)]
Factor = Annotated[float, Field(strict=True, ge=1e-9, le=1e15)]
CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)
_Kind = TypeVar("_Kind")
_adapter: Any = functools.cache(TypeAdapter)  # making one takes ten times as long as using it


def checked(kind: type[_Kind], values: Mapping[str, Any], what: str, hint: str | None = None) -> _Kind:
    """The dataclass, or pydantic's model, of `kind` that has these values, those of `what`; or all that is wrong."""
    names = signature(kind).parameters
    try:
        return _adapter(kind).validate_python(dict(values))
    except ValidationError as error:
        problems = schema_problems(error, lambda key: did_you_mean(key, names) or f"known are {', '.join(names)}")
        raise UserError(f"{what} is not usable:\n{listed(problems)}", hint) from None


def refuse(problems: Mapping[str, bool]) -> None:
    """Raises what is true of some problems, within a dataclass that pydantic may be checking."""
    if found := [problem for problem, is_so in problems.items() if is_so]:
        raise ValueError("\n  ".join(found))
