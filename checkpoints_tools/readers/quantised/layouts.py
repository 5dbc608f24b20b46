"""How toolkits pack 4-bit codes and scales, undone: every function returns logical order, [in, out].

A packed tensor is read as an array with an axis for each digit of its index, and its codes are put to where those digits
say. k is an input channel, n an output channel; digits are written as k / 16 (whole quotient) and k % 16.
"""

import numpy as np
from jaxtyping import Float, Int32, Shaped, UInt8


def gptq_codes(qweight: Int32[np.ndarray, "K8 N"]) -> UInt8[np.ndarray, "K N"]:
    """GPTQ (AutoGPTQ's QuantLinear.pack): row k is bits 4 (k % 8) of word k / 8."""
    words, columns = qweight.shape
    q = np.empty((words, 8, columns), np.uint8)
    for i in range(8):
        q[:, i] = (qweight >> (4 * i)) & 15
    return q.reshape(words * 8, columns)


def compressed_codes(packed: Int32[np.ndarray, "N K8"]) -> UInt8[np.ndarray, "K N"]:
    """compressed-tensors (pack_to_int32): input k of an output is bits 4 (k % 8) of word k / 8 of its row, plus 8."""
    return np.ascontiguousarray(gptq_codes(np.ascontiguousarray(packed.T)))


def marlin_codes(qweight: Int32[np.ndarray, "K16 N2"]) -> UInt8[np.ndarray, "K N"]:
    """Marlin (IST-DASLab/marlin, vLLM's gptq_marlin_repack): the order in which its kernel's fragments read 16 x 64 tiles.

    Words are ordered by k / 16, n / 64, n % 8, k % 8 / 2, n % 64 / 16; bits 4 i of one hold k % 2, n % 16 / 8 and
    k % 16 / 8 as the binary digits of i, the highest first.
    """
    tiles, columns = qweight.shape[0], qweight.shape[1] // 2
    words = qweight.reshape(tiles, columns // 64, 8, 4, 4).transpose(0, 3, 1, 4, 2)
    q = np.empty((tiles, 2, 4, 2, columns // 64, 4, 2, 8), np.uint8)
    for i in range(8):
        q[:, i % 2, :, i // 4, :, :, i // 2 % 2] = (words >> (4 * i)) & 15
    return q.reshape(tiles * 16, columns)


def qqq_codes(packed: Int32[np.ndarray, "K16 N2"], *, grouped: bool) -> UInt8[np.ndarray, "K N"]:
    """QQQ (HandH1998/QQQ, arXiv:2406.09904): codes 0..15, of which 8 stands for zero.

    Words are ordered by k / 16, n / 64, n % 8, k % 16 / 4, n % 64 / 16. With groups, bits 4 i of one hold k % 2, n % 16 / 8
    and k % 4 / 2 as the binary digits of i, the highest first. Without, i is 2 (k % 4) + 1 - n % 16 / 8, and the codes are
    signed.
    """
    tiles, columns = packed.shape[0], packed.shape[1] // 2
    words = packed.reshape(tiles, columns // 64, 8, 4, 4).transpose(0, 3, 1, 4, 2)
    q = np.empty((tiles, 4, 4, columns // 64, 4, 2, 8), np.uint8)
    for i in range(8):
        k, n = (2 * (i % 2) + i // 4, i // 2 % 2) if grouped else (i // 2, 1 - i % 2)
        q[:, :, k, :, :, n] = (words >> (4 * i)) & 15
    q = q.reshape(tiles * 16, columns)
    # as a signed code the bits of u stand for (u ^ 8) - 8
    return q if grouped else q ^ 8


def qserve_codes(qweight: Shaped[np.ndarray, "N K2"]) -> UInt8[np.ndarray, "K N"]:
    """QServe (mit-han-lab/omniserve, deepcompressor; arXiv:2405.04532): 32 x 32 tiles of bytes.

    Bytes are ordered by n / 32, k / 32, n % 8, k % 16 / 4, k % 32 / 16, n % 16 / 8, k % 4; the low four bits of one are
    of an output with n % 32 < 16, the high ones of its neighbour n + 16.
    """
    columns, rows = qweight.shape[0], qweight.shape[1] * 2
    packed = qweight.view(np.uint8).reshape(columns // 32, rows // 32, 8, 4, 2, 2, 4).transpose(1, 4, 3, 6, 0, 5, 2)
    q = np.empty((rows // 32, 2, 4, 4, columns // 32, 2, 2, 8), np.uint8)
    q[:, :, :, :, :, 0] = packed & 15
    q[:, :, :, :, :, 1] = packed >> 4
    return q.reshape(rows, columns)


def group_scales(stored: Float[np.ndarray, "G N"]) -> Float[np.ndarray, "G N"]:
    """Marlin's and QQQ's scales of groups: in each 64, output n is stored at 8 (n % 8) + n / 8."""
    groups, columns = stored.shape
    return np.ascontiguousarray(stored.reshape(groups, columns // 64, 8, 8).swapaxes(2, 3)).reshape(groups, columns)


def channel_scales(stored: Float[np.ndarray, "1 N"]) -> Float[np.ndarray, "N"]:
    """Marlin's and QQQ's scales of whole outputs: in each 32, output n is stored at 8 (n % 8 / 2) + 2 (n / 8) + n % 2."""
    return np.ascontiguousarray(stored.reshape(-1, 4, 4, 2).swapaxes(1, 2)).reshape(-1)


def qserve_group_parameters(stored: Shaped[np.ndarray, "G N"], *, kernel_order: bool) -> Shaped[np.ndarray, "G N"]:
    """QServe's scales and zeros of groups, which two packers order differently.

    In each 32, output n is stored at 4 (n % 8) + n / 8 in the order that QServe's kernel reads (omniserve, deepcompressor
    until February 2025), and at 16 (n / 16) + 2 (n % 8) + n % 16 / 8 in the one that deepcompressor writes since 70eb8aa.
    """
    groups, columns = stored.shape
    digits = (columns // 32, 8, 4) if kernel_order else (columns // 16, 8, 2)
    return np.ascontiguousarray(stored.reshape(groups, *digits).swapaxes(2, 3)).reshape(groups, columns)
