"""What the readers of quantised Hugging Face directories share."""

import abc
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int32

from checkpoints_tools.readers.base import Shape, Stored
from checkpoints_tools.readers.hf import HuggingFaceReader
from specmq_jax import formats
from specmq_jax.errors import UserError
from specmq_jax.formats import GroupedInt4, Int4GroupFormat, Logical
from specmq_jax.network.config import head_order
from specmq_jax.words import count

SCALE_TYPES = ("F16", "BF16", "F32")
Part = tuple[Shape, tuple[str, ...]]
"""The shape of a tensor and the types it may have."""


class QuantisedReader(HuggingFaceReader):
    """A Hugging Face directory whose layers' linear weights are integers with scales, in several tensors a module.

    Raises:
      UserError: what `HuggingFaceReader` raises; a weight that is not quantised beside ones that are; a bias that the model
        does not have; a family whose rows would have to be put into another order.
    """

    _main: str
    """The tensor that tells that a module is quantised."""
    _type: str
    """What the files hold, in words."""

    @abc.abstractmethod
    def _parts(self, module: str, shape: Shape) -> Mapping[str, Part]:
        """The tensors of a module by the last part of their names."""

    @abc.abstractmethod
    def _read_integers(self, module: str) -> Logical:
        """A quantised module's logical weight."""

    def _optional_parts(self, module: str, shape: Shape) -> Mapping[str, Part]:
        """Tensors that a module may have."""
        return {}

    def _leftovers(self, module: str) -> Iterable[str]:
        """Names of tensors that are ignored where they are empty."""
        return ()

    def _check_model(self) -> None:
        if head_order(self.llama) is not None or self.llama.mlp == "plain-gelu":
            raise UserError(f"{self.location} holds quantised weights of a model of type {self.llama.family}, which are not "
                            "read; give the model that they were made from")

    def _holds(self, module: str) -> bool:
        return self._has_main(module) or not is_quantised(module) and super()._holds(module)

    @property
    def _quantised(self) -> Iterable[str]:
        return filter(self._is_quantised, self.stored)

    def _is_quantised(self, module: str) -> bool:
        """Every linear weight of a layer is, lm_head may be."""
        return is_quantised(module) or module == "lm_head" and self._has_main(module)

    def _has_main(self, module: str) -> bool:
        return f"{module}.{self._main}" in self._tensors.headers

    def _head_format(self) -> str:
        return self._linear_format() if self._is_quantised("lm_head") else super()._head_format()

    def _check(self, module: str, shape: Shape) -> Stored:
        if not self._is_quantised(module):
            return super()._check(module, shape)
        if not self._has_main(module) and f"{module}.weight" in self._tensors.headers:
            raise UserError(f"{self.location} holds {module} as plain values, not as {self._type}; models of mixed precisions "
                            "are not read")
        optional = {"bias": ((shape[1],), SCALE_TYPES), **self._optional_parts(module, shape)}
        there = {name: part for name, part in optional.items() if f"{module}.{name}" in self._tensors.headers}
        headers = []
        for name, expected in {**self._parts(module, shape), **there}.items():
            headers.append(self._tensors.header(f"{module}.{name}", *expected))
            self._expected.add(f"{module}.{name}")
        self._expected |= {name for name in self._leftovers(module)
                           if name in self._tensors.headers and 0 in self._tensors.headers[name].shape}
        return Stored(self._type, sum(header.nbytes for header in headers))

    def _check_values(self) -> None:
        for module in self._quantised:
            has_bias = f"{module}.bias" in self._tensors.headers and f"{module}.bias" not in self.stored
            if has_bias and self._tensors.read(f"{module}.bias").any():
                raise UserError(f"{module}.bias is not zero; a model of type {self.llama.family} and its "
                                "config.json have none there")

    def _read_module(self, module: str) -> Logical:
        return self._read_integers(module) if self._is_quantised(module) else super()._read_module(module)


class GroupedReader(QuantisedReader):
    """4-bit symmetric weights in groups along the input, whose rows may be out of the order of their groups (act-order).

    Then rows are sorted by group, and the weight carries the order, by which its product takes the inputs: nothing is
    quantised again.

    Attributes:
      _group_size: rows that share a scale, -1 for all.
      _order_part: the tensor i32[K] that gives each row's group.
      _asked_order: what config.json says where rows are out of order, so that each module has that tensor.
    """

    _group_size: int
    _order_part: str
    _asked_order: str | None = None

    @property
    def _type(self) -> str:
        return f"int4 {'per channel' if self._group_size == -1 else f'g{self._group_size}'}"

    @abc.abstractmethod
    def _codes(self, module: str) -> np.ndarray:
        """uint8[K, N] in the file's order of rows."""

    @abc.abstractmethod
    def _scales(self, module: str) -> np.ndarray:
        """[groups, N]."""

    def _groups(self, rows: int) -> int:
        return 1 if self._group_size == -1 else -(-rows // self._group_size)

    def _check(self, module: str, shape: Shape) -> Stored:
        stored, name = super()._check(module, shape), f"{module}.{self._order_part}"
        several = self._is_quantised(module) and self._groups(shape[0]) > 1
        if self._asked_order and several and name not in self._tensors.headers:
            raise UserError(f"{self.location} is quantised with {self._asked_order} and lacks the tensor {name}, which says "
                            "what group each row is in")
        return stored

    def _optional_parts(self, module: str, shape: Shape) -> Mapping[str, Part]:
        return {self._order_part: ((shape[0],), ("I32", "I64"))}

    def _check_values(self) -> None:
        super()._check_values()
        self._orders = {module: self._find_order(module) for module in self._quantised}
        for modules in self._modules.values():
            first, *others = modules
            for other in others:
                if not _same_order(self._orders.get(first), self._orders.get(other)):
                    raise UserError(f"{first} and {other} read the same inputs in different orders ({self._order_part}); they "
                                    "can't be multiplied as one; quantise with desc_act = false or static_groups = true")

    def _find_order(self, module: str) -> Int32[np.ndarray, "K"] | None:
        name = f"{module}.{self._order_part}"
        if name not in self._tensors.headers:
            return None
        groups = self._tensors.read(name)
        return row_order(name, groups, len(groups) if self._group_size == -1 else self._group_size)

    def _has_order(self, module: str) -> bool:
        """Whether the weights that share a format with this module's have an order."""
        is_head = module == "lm_head"
        return any(order is not None for other, order in self._orders.items() if (other == "lm_head") == is_head)

    def _linear_format(self) -> str:
        return self._group_format("")

    def _head_format(self) -> str:
        return self._group_format("lm_head") if self._is_quantised("lm_head") else super()._head_format()

    def _group_format(self, module: str) -> str:
        return f"w4a16-g{self._group_size}" + ("-act-order" if self._has_order(module) else "")

    def _read_integers(self, module: str) -> GroupedInt4:
        q, scales, order = self._codes(module), halves(self._scales(module)), self._orders[module]
        if order is not None:
            q = q[order]
        elif self._has_order(module):
            order = np.arange(len(q), dtype=np.int32)
        return GroupedInt4(q, scales, self._group_size, order)


def row_order(name: str, groups: Int32[np.ndarray, "K"], group_size: int) -> Int32[np.ndarray, "K"] | None:
    """The rows sorted by group, None where they are so already.

    Raises:
      UserError: a group that does not exist, or one of another size.
    """
    expected = np.arange(len(groups)) // group_size
    if np.array_equal(groups, expected):
        return None
    if groups.min() < 0 or groups.max() > expected[-1]:
        wrong = groups[(groups < 0) | (groups > expected[-1])][0]
        raise UserError(f"{name} puts a row into group {wrong}; expected 0 to {expected[-1]}")
    counts, wanted = np.bincount(groups, minlength=expected[-1] + 1), np.bincount(expected)
    if not np.array_equal(counts, wanted):
        group = int(np.flatnonzero(counts != wanted)[0])
        raise UserError(f"{name} puts {count(counts[group], 'row')} into group {group}; expected {wanted[group]}")
    return np.argsort(groups, kind="stable").astype(np.int32)


def halves(scales: np.ndarray) -> Float[np.ndarray, "..."]:
    """Scales of f16 as they are, others in f32."""
    return scales if scales.dtype == np.float16 else scales.astype(np.float32)


def is_quantised(module: str) -> bool:
    """Whether quantised checkpoints quantise a module of that name."""
    return module.endswith("_proj")


def check_divisible(module: str, shape: Shape, rows: int, columns: int) -> None:
    """Refuses sizes that a layout has no place for."""
    if shape[0] % rows or shape[1] % columns:
        raise UserError(f"{module} has shape {list(shape)}; its layout holds multiples of [{rows}, {columns}]")


def check_bits(directory: pathlib.Path, bits: Any) -> None:
    if bits != 4:
        raise UserError(f"{directory} is quantised to {bits!r} bits; only 4 are supported")


def check_group_size(directory: pathlib.Path, group_size: Any) -> int:
    """The group size, if W4A16 knows it; None stands for -1."""
    group_size = -1 if group_size is None else group_size
    known = sorted(f.group_size for f in map(formats.get, formats.names()) if isinstance(f, Int4GroupFormat))
    if group_size not in known:
        raise UserError(f"{directory} has group_size {group_size!r}; supported are {', '.join(map(str, known))}")
    return group_size


def _same_order(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))
