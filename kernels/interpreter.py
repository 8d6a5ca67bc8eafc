"""Runs a Triton kernel on numpy arrays in Triton's interpreter: the source that a GPU runs, without GPU or torch.

Triton 3.6.0's interpreter truncates to bfloat16 instead of rounding, and multiplies bit patterns of
bfloat16 in `tl.dot`. Here it is patched while a kernel runs: bfloat16 is rounded to nearest even, and
computed as the numbers it stands for. The patches are then undone, so that the same process can still
compile kernels.
"""

import contextlib
import functools
import threading
import types

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_TRITON_NAMES = {'bfloat16': 'bf16', 'float32': 'fp32', 'int32': 'i32'}
_one_at_a_time = threading.Lock()  # the interpreter's state is global, and each device calls from its own thread


def run(kernel: JITFunction, grid: tuple[int, ...], *arrays: np.ndarray, **constants) -> None:
    """Runs `kernel` over `grid`; it reads and writes the arrays (C-contiguous) in place.

    Raises KeyError for a dtype that our kernels do not take.
    """
    with _one_at_a_time, _interpreting(), np.errstate(all='ignore'):  # a GPU does not report an overflow
        interpreter.InterpretedFunction(kernel.fn)[grid](*map(_Pointer, arrays), **constants)


class _Pointer:
    """A numpy array with a device tensor's interface, which the interpreter copies to the host and back."""

    def __init__(self, array: np.ndarray):
        self._array, self.dtype = array, _TRITON_NAMES[array.dtype.name]

    def data_ptr(self):
        return self._array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self._array.shape

    def stride(self):
        return tuple(step // self._array.itemsize for step in self._array.strides)

    def copy_(self, other):
        assert other is self


def _is_bfloat16(handle) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle):
    """Converts a bfloat16 handle, which holds uint16, to float32; returns any other unchanged."""
    if not _is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle(handle.data.view(_BFLOAT16).astype(np.float32), tl.float32)


def _rounded(data: np.ndarray):
    """Returns a bfloat16 handle for float32 data, rounded to nearest even."""
    return interpreter.TensorHandle(
        np.ascontiguousarray(data, np.float32).astype(_BFLOAT16).view(np.uint16), tl.bfloat16
    )


def _patched_methods(builder) -> dict:
    """Returns {name: a method that handles bfloat16 first} for the builder's methods that get it wrong."""
    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp
    binary, unary = builder.binary_op, builder.unary_op

    def create_dot(self, a, b, d, *rest):
        if d.dtype.scalar != tl.float32:
            return dot(self, _widened(a), _widened(b), d, *rest)
        # In float64, rounded once: BLAS sums an element in an order that depends on the tile's layout, a GPU does not.
        product = np.matmul(_widened(a).data, _widened(b).data, dtype=np.float64)
        return interpreter.TensorHandle((product + d.data).astype(np.float32), tl.float32)

    def cast_impl(self, handle, dtype):
        if dtype.scalar == tl.bfloat16:
            return handle if _is_bfloat16(handle) else _rounded(handle.data.astype(np.float32))
        if _is_bfloat16(handle) and dtype.scalar == tl.float32:
            return _widened(handle)
        return cast(self, _widened(handle), dtype)

    def create_fp_to_fp(self, handle, dtype, rounding):
        if _is_bfloat16(handle) or dtype.scalar == tl.bfloat16:
            return cast_impl(self, handle, dtype)
        return convert(self, handle, dtype, rounding)

    def binary_op(self, left, right, op):
        if not (_is_bfloat16(left) or _is_bfloat16(right)):
            return binary(self, left, right, op)
        result = op(_widened(left).data, _widened(right).data)
        return interpreter.TensorHandle(result, tl.int1) if result.dtype == bool else _rounded(result)

    def unary_op(self, handle, op):
        return _rounded(op(_widened(handle).data)) if _is_bfloat16(handle) else unary(self, handle, op)

    return {
        'create_dot': create_dot,
        'cast_impl': cast_impl,
        'create_fp_to_fp': create_fp_to_fp,
        'binary_op': binary_op,
        'unary_op': unary_op,
    }


@functools.cache
def _rewritten(function):
    """Returns a function that a kernel calls, rewritten for the interpreter; the language is already patched."""
    return interpreter.InterpretedFunction(function).rewrite()


@contextlib.contextmanager
def _interpreting():
    """Lets functions that a kernel calls run interpreted, too; undoes what Triton patches in its own language."""
    core = tl.core
    language = [tl, core, tl.math, tl.standard, tl.random, tl.tensor, tl.dtype]
    language += [core.tensor_descriptor_base, core.tensor_descriptor]
    language += [tl.condition] if hasattr(tl, 'condition') else []
    before = [(space, dict(vars(space))) for space in language]
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, *rest):
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())  # numpy 2.5 refuses a [1] as an index

    def call(function, *arguments, **constants):
        return _rewritten(function.fn)(*arguments, **constants)

    builder = interpreter.InterpreterBuilder
    patches = [(builder, name, method) for name, method in _patched_methods(builder).items()]
    patches += [(JITFunction, '__call__', call), (interpreter, '_patch_lang_tensor', patch_tensor_and_index)]
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in patches]
    try:
        for owner, name, patched in patches:
            setattr(owner, name, patched)
        # Patched here too: the functions that a kernel calls see the language under another name.
        interpreter._patch_lang(types.SimpleNamespace(__globals__={'tl': tl, 'core': core}))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
        for space, attributes in before:
            if isinstance(space, type):  # modules keep what the rewriter added, since rewritten code is cached
                for name in set(vars(space)) - set(attributes):
                    delattr(space, name)
            for name, value in attributes.items():
                if vars(space).get(name) is not value:
                    setattr(space, name, value)
