"""The options of a sharded computation: what ``convert_model`` takes, checked once, compared by the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from distpatch.comm.meshes import Dims, dims_of
from distpatch.layout.shares import Weights, weights_of

OUTPUTS = ("gather", "shard", "rank0")
FALLBACKS = ("warn", "allow", "error")
POLICIES = ("shard", "auto")
ATTENTIONS = ("gather", "ring", "all_to_all", "auto")
Shard = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Options:
    """What ``convert_model`` says of them. Raises ``ValueError`` for one out of range.

    ``splits``, ``sequential``, ``min_numel``, ``workspace_bytes``: how convolutions are cut; ``lazy``: whether rows
    may be computed later (lazy/recipe.py); ``overlap``: whether halo rows travel while rows are computed that need none
    (rules/core/halo.py); ``fallback``: what an operation without a rule does; ``dim``, ``output``, ``tiled``,
    ``liveness`` (seconds), ``late_check``: how calls of a converted model begin and end; ``compile``: whether they are
    compiled, and what ``torch.compile`` is told; ``weights``: in which proportion ranks get rows, where it is no tuple
    of one positive number a rank refused by ``convert_model`` once all ranks have met; ``policy``: whether calls of
    small inputs may be computed whole (model/policy.py); ``shard``: the arguments that are sharded, by name,
    each with its dim (model/entrance.py); ``attention``: how keys and values come (rules/linalg/attention.py). By
    default as for tensors of no model: nothing is cut.
    """

    splits: int | str = 1
    sequential: bool = field(default=True, hash=False)  # plans are looked up at every call, by what differs most
    dim: Dims = field(default=-2, hash=False)
    output: str = field(default="gather", hash=False)
    fallback: str = field(default="warn", hash=False)
    tiled: bool = field(default=False, hash=False)
    min_numel: int = field(default=0, hash=False)
    workspace_bytes: int | None = None
    lazy: bool = False
    liveness: float | None = field(default=3.0, hash=False)
    late_check: bool = field(default=False, hash=False)
    compile: bool | Mapping[str, Any] = field(default=False, hash=False)
    overlap: bool = field(default=True, hash=False)
    weights: Weights | str | None = field(default=None, hash=False)
    policy: str = field(default="shard", hash=False)
    shard: Shard | None = field(default=None, hash=False)
    attention: str = field(default="gather", hash=False)

    def __post_init__(self) -> None:
        check_splits(self.splits)
        object.__setattr__(self, "dim", dims_of(self.dim))
        if not isinstance(self.dim, int):
            given = {"compile": self.compile is not False, "policy": self.policy != "shard", "weights": self.weights}
            given |= {"shard": self.shard is not None, "attention": self.attention != "gather"}
            for name in (name for name, value in given.items() if value):
                raise ValueError(f"{name}= is for one dim; got dim={self.dim}. Leave one of them out")
        object.__setattr__(self, "weights", weights_of(self.weights))
        object.__setattr__(self, "shard", _shard_of(self.shard))
        choices_of = {"output": OUTPUTS, "fallback": FALLBACKS, "policy": POLICIES, "attention": ATTENTIONS}
        for name, choices in choices_of.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} is one of {choices}; got {value!r}")
        if self.liveness is not None and self.liveness <= 0:
            raise ValueError(f"liveness is a number of seconds above 0, or None; got {self.liveness!r}")
        if not isinstance(self.compile, (bool, Mapping)):
            raise ValueError(f"compile is True, False, or what torch.compile is told; got {self.compile!r}")
        if self.compile is not False and self.policy == "auto":
            raise ValueError('policy="auto" tries calls both ways, and compile= makes one graph of them: leave one out')
        if self.min_numel < 0 or (self.workspace_bytes is not None and self.workspace_bytes < 1):
            raise ValueError(
                f"min_numel and workspace_bytes are positive; got {self.min_numel} and {self.workspace_bytes}"
            )

    def __str__(self) -> str:
        return ", ".join(f"{one.name}={_shown(getattr(self, one.name))}" for one in fields(self))

    @property
    def shares(self) -> Weights | None:
        """The weights of a conversion, where the ranks know them."""
        return self.weights if isinstance(self.weights, tuple) else None

    @property
    def packed(self) -> str:
        """As an operator of a compiled graph carries them: how rows are computed there, where nothing is deferred."""
        weights = ",".join(map(repr, self.shares or ()))
        numbers = f"{self.min_numel} {self.workspace_bytes}"
        return f"{self.splits} {self.sequential} {self.fallback} {numbers} {self.attention} {weights}"

    def of_outer_axis(self, dim: int) -> Options:
        """Of an axis whose rows are sharded themselves: these are computed in patches, or later, by the inner one."""
        return replace(self, dim=dim, splits=1, lazy=False, overlap=False)

    @staticmethod
    def unpacked(text: str) -> Options:
        splits, sequential, fallback, min_numel, workspace, attention, weights = text.split(" ")
        return Options(
            splits=int(splits) if splits.isdigit() else splits,
            sequential=sequential == "True",
            fallback=fallback,
            min_numel=int(min_numel),
            workspace_bytes=int(workspace) if workspace.isdigit() else None,
            weights=tuple(map(float, weights.split(","))) if weights else None,
            attention=attention,
        )


def _shown(value: Any) -> str:
    """The same on all ranks: of a function, such as a compiler's backend, its name, and not where it is in memory."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(value[key])}" for key in sorted(value)) + "}"
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else repr(value)


def _shard_of(given: Any) -> Shard | None:
    """Dims of arguments by name, in the order of the names: the same on all ranks however they are written."""
    if given is None:
        return None
    pairs = tuple(sorted(dict(given).items())) if given else ()
    if not pairs or not all(isinstance(name, str) and type(dim) is int for name, dim in pairs):
        raise ValueError(f'shard names arguments, each with a dim, such as {{"hidden_states": 1}}; got {given!r}')
    return pairs


def check_splits(splits: object) -> None:
    """Raise ``ValueError`` for what is no number of patches."""
    if splits != "auto" and not (isinstance(splits, int) and splits >= 1):
        raise ValueError(f'splits is a number of at least 1, or "auto"; got {splits!r}')


DEFAULT = Options()  # of tensors of no model (tests set others)


def default() -> Options:
    return DEFAULT
