"""What the specs of the modulated norms share."""

import torch

from liger_fn.testing.spec import BadCall, Benchmark, Case


def case(
    *shape: int, samples: int = 1, shift: bool = True, weight: bool = False,
    like_x: bool = False, id: str = "", **options,
) -> Case:  # fmt: skip
    """x of this shape; scale and shift for each of its first `samples` sizes."""

    def make(draw):
        own = list(shape[:samples])
        own += [1] * (len(shape) - 1 - samples) if like_x else []
        features = {"weight": draw.normal(shape[-1])} if weight else {}
        return {
            "x": draw.normal(*shape),
            "scale": draw.normal(*own, shape[-1]),
            "shift": draw.normal(*own, shape[-1]) if shift else None,
            **features,
            **options,
        }

    return Case(id or "x".join(map(str, shape)), make)


CASES = (
    case(4, 3, 8),
    case(2, 3, 2, 5, like_x=True, id="ones-between"),
    case(3, 5, samples=0, shift=False, id="one-scale"),
    case(2, 3, 6, samples=2, eps=0.5, id="each-token"),
)

SIZES = (
    case(0, 3, 16),
    case(2, 0, 16),
    case(5, 1, 1),
    case(7, samples=0),
    case(3, 70, 130, id="strips"),
    case(2, 3, 9000, id="wide-bwd"),
    case(1, 3, 20000, id="wide"),
    Case(
        "scale-in-float32",
        lambda d: {
            "x": d.normal(3, 5, 64),
            "scale": d.normal(3, 64, dtype=torch.float32),
            "shift": d.normal(3, 64, dtype=torch.float32),
        },
    ),
)


def _benchmark(B: int, T: int, D: int) -> Benchmark:
    def make(draw):
        return {"x": draw.normal(B, T, D), "scale": draw.normal(B, D), "shift": draw.normal(B, D)}

    n = B * T * D
    return Benchmark(f"{B}x{T}x{D}", make, bytes_fwd=4 * n, bytes_bwd=6 * n)


# DiT-XL/2 at 256 pixels; a 12-billion-parameter image model at 1024; a video model.
BENCHMARKS = (_benchmark(64, 256, 1152), _benchmark(2, 4096, 3072), _benchmark(1, 16384, 5120))


def huge() -> Case:
    return Case(
        "65x8192x4096",
        lambda d: {
            "x": d.normal(1, 8192, 4096).repeat(65, 1, 1),
            "scale": d.normal(65, 4096),
            "shift": d.normal(65, 4096),
        },
    )


def errors(op: str) -> tuple[BadCall, ...]:
    def bad(id, change, error, sentence):
        def make(draw):
            call = {"x": draw.normal(4, 3, 8), "scale": draw.normal(4, 8)}
            return call | change(draw)

        return BadCall(id, make, error, f"{op}: {sentence}")

    fits = (
        "`scale` must have the last size of `x`, 8, after the first sizes of `x`, (4, 3), or some"
    )
    return (
        bad("x integer", lambda d: {"x": d.integers(3, 4, 3, 8)}, TypeError,
            "`x` must have a floating-point dtype"),
        bad("x scalar", lambda d: {"x": d.normal()}, ValueError,
            "`x` must have at least one dimension"),
        bad("scale integer", lambda d: {"scale": d.integers(3, 4, 8)}, TypeError,
            "`scale` must have a floating-point dtype"),
        bad("scale scalar", lambda d: {"scale": d.normal()}, ValueError,
            "`scale` must have at least one dimension"),
        bad("scale samples", lambda d: {"scale": d.normal(3, 8)}, ValueError, fits),
        bad("scale width", lambda d: {"scale": d.normal(4, 7)}, ValueError, fits),
        bad("scale device", lambda d: {"scale": torch.ones(4, 8, device="meta")}, ValueError,
            "`scale` must be on the device of `x`"),
        bad("shift shape", lambda d: {"shift": d.normal(8)}, ValueError,
            "`shift` must have shape (4, 8), the shape of `scale`; got (8,)."),
        bad("shift integer", lambda d: {"shift": d.integers(3, 4, 8)}, TypeError,
            "`shift` must have a floating-point dtype"),
        bad("eps", lambda d: {"eps": None}, TypeError, "`eps` must be a number; got NoneType."),
    )  # fmt: skip
