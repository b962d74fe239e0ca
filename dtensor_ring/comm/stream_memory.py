"""The CUDA driver's stream memory operations: a stream waits for a word of memory, or writes one, and no kernel runs for it.

    stream       wait_for(word, 1)        what follows on the stream starts once the word is 1
    other one    write(word, 1)           once all before it on that stream is done, and can be seen by all

PyTorch has a write (`_SymmetricMemory.stream_write_value32`) and, for waiting, kernels of one thread: such a kernel starts only
when an attention kernel that fills the GPU leaves it room, and the transfer behind it would start as late. These operations take
no room. On one H100, beside matrix products, a word is seen after 0.03 ms and a kernel of one thread begins after 1.4 ms; two
processes that share the GPU answer each other in 15 us by words, and in 4.5 ms by such kernels. The operations are part of every
driver since CUDA 12 and are called through `ctypes`; a `wait` in PyTorch would let us drop this file.
"""

from __future__ import annotations

import ctypes

from torch.cuda import Stream

_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_DEFAULT = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: what came before on the stream is visible before the value is
_NAMES = ("cuStreamWaitValue32_v2", "cuStreamWriteValue32_v2")
_LIBRARY = "libcuda.so.1"


class StreamMemory:
    """The driver's operations. Words are 4 bytes, given by their address: memory of this or another GPU, or pinned host memory."""

    def __init__(self) -> None:
        library = ctypes.CDLL(_LIBRARY)
        self._wait, self._write = (getattr(library, name) for name in _NAMES)
        for function in (self._wait, self._write):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
            function.restype = ctypes.c_int

    @staticmethod
    def lacks() -> str | None:
        """Why there are no such operations on this machine, as a sentence, or None."""
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError:
            return f"needs the CUDA driver, and {_LIBRARY} cannot be loaded"
        missing = [name for name in _NAMES if not hasattr(library, name)]
        return f"needs a CUDA driver of version 12 or later: {_LIBRARY} has no {missing[0]}" if missing else None

    def wait_for(self, stream: Stream, address: int, value: int) -> None:
        """Let the stream go on when the word has the value."""
        _check("wait", self._wait(stream.cuda_stream, address, value, _EQUAL))

    def write(self, stream: Stream, address: int, value: int) -> None:
        """Write the word when all that the stream was given before is done."""
        _check("write", self._write(stream.cuda_stream, address, value, _DEFAULT))


def _check(operation: str, status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver refuses to {operation} a word of memory on a stream: error {status}")
