"""The kernels' side of the pointer tables (tables.py): which elements are this program's, and their memory.

A program has one chunk: CHUNK consecutive elements of one tensor, fewer at its end. It walks through it in blocks:
full ones without a mask, so that the compiler may use 16-byte accesses, then what is left with one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sama_kernels.backends.triton.storage import widen, word_type

LENGTH = tl.constexpr(0)
INDEX = tl.constexpr(1)
ADDRESSES = tl.constexpr(2)
"""Columns of a row: number of elements, position of the tensor in the caller's list, address of each operand."""


@triton.jit
def locate(chunks, rows, OPERANDS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's row, where in the tensor its chunk starts (int64), and how many elements it has (int32)."""
    entry = tl.load(chunks + tl.program_id(0))
    row = rows + (entry >> 32) * (ADDRESSES + OPERANDS)
    start = (entry & 0xFFFFFFFF) * CHUNK
    length = tl.minimum(tl.load(row + LENGTH) - start, CHUNK).to(tl.int32)
    return row, start, length


@triton.jit
def words_at(row, operand: tl.constexpr, start, STORAGE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start` of an operand. ALIGNED: its address is a multiple of 16, and so is the chunk's."""
    words = tl.load(row + ADDRESSES + operand).to(tl.pointer_type(word_type(STORAGE))) + start
    if ALIGNED:
        words = tl.multiple_of(words, 16)
    return words


@triton.jit
def load_words(words, first, length, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Elements [first, first + BLOCK) of the chunk; zeros beyond its end."""
    element = first + tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(words + element, mask=element < length, other=0)
    else:
        return tl.load(words + element)


@triton.jit
def load(words, first, length, STORAGE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    return widen(load_words(words, first, length, BLOCK, MASKED), STORAGE, COMPUTE)


@triton.jit
def store_words(words, first, length, value, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    element = first + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(words + element, value, mask=element < length)
    else:
        tl.store(words + element, value)


@triton.jit
def in_chunk(value, first, length, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """`value` with 0 beyond the end of the chunk."""
    if MASKED:
        return tl.where(first + tl.arange(0, BLOCK) < length, value, 0.0)
    else:
        return value


@triton.constexpr_function
def one_access(storage, operands):
    """Elements that a thread has next to each other: 16 bytes of the narrowest of the first `operands` dtypes."""
    return 128 // min(dtype.primitive_bitwidth for dtype in storage[:operands])


@triton.jit
def partial_sums(values, GROUP: tl.constexpr):
    """Sums of GROUP neighbours. If one thread has them, as running totals they take few registers."""
    return tl.sum(tl.reshape(values, (values.shape[0] // GROUP, GROUP)), axis=1)
