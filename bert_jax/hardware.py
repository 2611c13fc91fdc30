"""What one device, as JAX counts them, can do at most: published figures, per core of a TPU v2 or v3, per chip else."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
      peak_tflops: bf16 products, 1e12 FLOP/s.
      memory_gib: high-bandwidth memory that a program may use, 2^30 bytes.
      memory_tb_s: its bandwidth, 1e12 bytes/s.
      link_gb_s: between neighbours, all links together, one direction, 1e9 bytes/s.
      clock_ghz: 1e9 cycles/s; 0 where the compiler gives none.
      per_chip: devices of a chip.
      torus: dimensions in which chips are wired; 1 where each has all links to every other.
      network_gb_s: its share of its host's network, over which slices are joined, one direction, 1e9 bytes/s; of a chip
        of which Google gives none, a v5p's.
    """

    peak_tflops: float
    memory_gib: float
    memory_tb_s: float
    link_gb_s: float
    clock_ghz: float = 0
    per_chip: int = 1
    torus: int = 1
    network_gb_s: float = 6.25


DEVICES = {  # the longest name that a device's kind begins with
    'TPU v2': Device(22.5, 8, 0.35, 125, 0.7, 2, torus=2),
    'TPU v3': Device(61.5, 16, 0.45, 140, 0.94, 2, torus=2),
    'TPU v4': Device(275, 30.75, 1.2, 300, 1.05, torus=3),
    'TPU v5 lite': Device(197, 15.75, 0.81, 200, 1.5, torus=2, network_gb_s=3.125),
    'TPU v5e': Device(197, 15.75, 0.81, 200, 1.5, torus=2, network_gb_s=3.125),
    'TPU v5': Device(459, 95.74, 2.8, 600, 1.75, torus=3),
    'TPU v6 lite': Device(918, 31.25, 1.6, 448, 1.75, torus=2, network_gb_s=12.5),
    'TPU v6e': Device(918, 31.25, 1.6, 448, 1.75, torus=2, network_gb_s=12.5),
    'NVIDIA A100': Device(312, 80, 2.0, 300),
    'NVIDIA H100': Device(989, 80, 3.35, 450),
    'NVIDIA H100 PCIe': Device(756, 80, 2.0, 300),
    'NVIDIA H100 NVL': Device(835, 94, 3.9, 300),
    'NVIDIA H200': Device(989, 141, 4.8, 450),
    'NVIDIA H200 NVL': Device(835, 141, 4.8, 450),
}


def of(device: jax.Device) -> Device | None:
    """The figures of a device; None where they are not known."""
    names = [name for name in DEVICES if device.device_kind.startswith(name)]
    return DEVICES[max(names, key=len)] if names else None


def memory_bytes(device: jax.Device) -> float | None:
    """What a program may use of a device's memory, as the device itself says if it is there; None on a CPU."""
    try:
        stats = device.memory_stats() or {}
    except (jax.errors.JaxRuntimeError, NotImplementedError, AttributeError):  # a device of a slice that is not there
        stats = {}
    known = of(device)
    return stats.get('bytes_limit') or (known.memory_gib * 2**30 if known else None)


def peak_flops() -> float | None:
    """The devices' bf16 peak in FLOP/s, all together; None where it is not known."""
    known = of(jax.devices()[0])
    return known.peak_tflops * 1e12 * jax.device_count() if known else None
