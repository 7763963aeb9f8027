"""Alpha-beta costs of the collectives of data parallelism, on paper: not measured.

A message of n bytes takes alpha + n / bandwidth (Hockney, "The communication challenge for MPP: Intel Paragon and Meiko
CS-2", Parallel Computing 20(3), 1994). What a collective adds up to is from Thakur, Rabenseifner and Gropp,
"Optimization of collective communication operations in MPICH", IJHPCA 19(1), 2005; the time of the additions (their
gamma) is left out. Latencies, and the bandwidth that a link really gives, are those by which NVIDIA's NCCL chooses its
algorithms (github.com/NVIDIA/nccl): src/graph/tuning.cc at commit 01afd20 (`baseLat`, `hwLat`: ring, protocol Simple)
and src/graph/topo.h at 069a3d4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """Seconds per message, and bytes per second that one GPU sends (as many again are received meanwhile)."""

    alpha: float
    bandwidth: float


@dataclass(frozen=True)
class Cluster:
    """What a step runs on: peak FLOP/s, bytes/s and bytes of the memory of a GPU, GPUs per node, and the links.

    `between` is the share of one GPU in the network adapters of its node; `start` are the seconds before the first
    message of any collective.
    """

    name: str
    peak: float
    memory_bandwidth: float
    memory: float
    node: int
    inside: Link
    between: Link
    start: float = 8.4e-6  # NCCL, baseLat


# H100 SXM data sheet (NVIDIA, 2023): 989.4 TFLOP/s bfloat16 (1,979 with sparsity), 3.35 TB/s, 80 GB, NVLink 900 GB/s
# for both directions, of which NCCL counts 18 links at 20.6 GB/s (SM90_NVLINK_BW). DGX H100 data sheet: one ConnectX-7
# at 400 Gb/s (NDR InfiniBand) for each of the 8 GPUs; NCCL counts 12 GB/s for 100 Gb/s (NET_BW).
H100 = Cluster(
    "H100 SXM, nodes of 8, NDR InfiniBand", 989.4e12, 3.35e12, 80e9, 8, Link(3.4e-6, 18 * 20.6e9), Link(9.6e-6, 48e9)
)
# Those of torchtitan's benchmarks have slower memory, and more of it (benchmarks/llama3_h100_202412_torchtitan.md).
H100_HBM2E = Cluster("H100, HBM2e", 989.4e12, 2.4e12, 96e9, 8, H100.inside, H100.between)
# V100 data sheet (NVIDIA, 2018): 15.7 TFLOP/s float32 (125 in the tensor cores), 900 GB/s, NVLink 300 GB/s for both
# directions, of which NCCL counts 6 links at 20 GB/s (SM70_NVLINK_BW); PCIe 3.0 x16 counts 12 GB/s (PCI_BW).
V100_NVLINK = Cluster("V100, NVLink", 15.7e12, 900e9, 32e9, 4, Link(3.4e-6, 6 * 20e9), H100.between)
V100_PCIE = Cluster("V100, PCIe", 15.7e12, 900e9, 32e9, 4, Link(5.7e-6, 12e9), H100.between)


@dataclass(frozen=True)
class Cost:
    """Seconds of a collective, and the bytes that one GPU sends within its node and to other nodes (on average)."""

    seconds: float = 0.0
    inside: float = 0.0
    between: float = 0.0


def shape(cluster: Cluster, gpus: int) -> tuple[int, int]:
    """Nodes and GPUs per node. Raises ValueError for a last node that is not full."""
    if gpus <= cluster.node:
        return 1, gpus
    if gpus % cluster.node:
        raise ValueError(f"gpus: {gpus} is neither at most one node of {cluster.node}, nor a number of whole nodes")
    return gpus // cluster.node, cluster.node


def flat_rate(cluster: Cluster, nodes: int, per_node: int) -> float:
    """Bytes per second of a ring or tree over all GPUs: as many run side by side as a node has adapters."""
    inside = cluster.inside.bandwidth
    return inside if nodes == 1 else min(inside, per_node * cluster.between.bandwidth)


def ring(cluster: Cluster, gpus: int, size: float, rounds: int) -> Cost:
    """rounds (p - 1) messages of size / p: reduce-scatter and all-gather are one round, an all-reduce is two.

    rounds (p - 1) / p size bytes are sent, the least that is possible (Patarasuk and Yuan, "Bandwidth optimal
    all-reduce algorithms for clusters of workstations", JPDC 69(2), 2009). In a round nodes - 1 messages wait for the
    network.
    """
    if gpus == 1:
        return Cost()
    nodes, per_node = shape(cluster, gpus)
    latency = rounds * ((gpus - nodes) * cluster.inside.alpha + (nodes - 1) * cluster.between.alpha)
    sent = rounds * (gpus - 1) / gpus * size
    between = sent / per_node if nodes > 1 else 0.0
    return Cost(cluster.start + latency + sent / flat_rate(cluster, nodes, per_node), sent - between, between)


def tree_all_reduce(cluster: Cluster, gpus: int, size: float) -> Cost:
    """Up and down a tree over the nodes, whose GPUs form a chain, in a pipeline: 2 log2(nodes) network latencies.

    Two trees in which every rank is a leaf of one use the full bandwidth (Sanders, Speck and Traeff, "Two-tree
    algorithms for full bandwidth broadcast, reduction and scan", Parallel Computing 35(12), 2009).
    """
    if gpus == 1:
        return Cost()
    nodes, per_node = shape(cluster, gpus)
    latency = 2 * ((per_node - 1) * cluster.inside.alpha + math.ceil(math.log2(nodes)) * cluster.between.alpha)
    sent, between = 2 * (gpus - 1) / gpus * size, 2 * (nodes - 1) / gpus * size
    return Cost(cluster.start + latency + 2 * size / flat_rate(cluster, nodes, per_node), sent - between, between)


def hierarchical_all_reduce(cluster: Cluster, gpus: int, size: float) -> Cost:
    """Reduce-scatter in the node; all-reduce of every GPU's part with its peers in the other nodes; all-gather.

    The three follow each other (an upper bound: NCCL and others run them as a pipeline of chunks). The network carries
    2 (nodes - 1) / nodes of size / per_node per GPU, all links together 2 (p - 1) / p of size, as in a ring.
    """
    nodes, per_node = shape(cluster, gpus)
    if nodes == 1:
        return ring(cluster, gpus, size, rounds=2)
    inside = 2 * (per_node - 1) / per_node * size
    between = 2 * (nodes - 1) / nodes * size / per_node
    latency = 2 * ((per_node - 1) * cluster.inside.alpha + (nodes - 1) * cluster.between.alpha)
    transfer = inside / cluster.inside.bandwidth + between / cluster.between.bandwidth
    return Cost(3 * cluster.start + latency + transfer, inside, between)


def all_reduce(cluster: Cluster, gpus: int, size: float) -> Cost:
    """The fastest of the three, as NCCL's tuner chooses (`ncclTopoGetAlgoTime`)."""
    candidates = (
        ring(cluster, gpus, size, rounds=2),
        tree_all_reduce(cluster, gpus, size),
        hierarchical_all_reduce(cluster, gpus, size),
    )
    return min(candidates, key=lambda cost: cost.seconds)


def reduce_scatter(cluster: Cluster, gpus: int, size: float) -> Cost:
    """Half a ring all-reduce; `size` is what every rank puts in."""
    return ring(cluster, gpus, size, rounds=1)


def all_gather(cluster: Cluster, gpus: int, size: float) -> Cost:
    """Half a ring all-reduce; `size` is what every rank gets."""
    return ring(cluster, gpus, size, rounds=1)


def exposed(behind: float, parts: int, seconds: float) -> float:
    """What is left of `parts` transfers of `seconds` each, one after the other, beside a computation of `behind` s.

    Part i can start when (i + 1) / parts of the computation is done: gradient buckets of a backward pass (Li et al.,
    "PyTorch Distributed", VLDB 13, 2020). The last part is never hidden, and of the others what is longer than the
    computation of one part. The same holds for layers that are gathered one ahead of where they are used (Zhao et al.,
    "PyTorch FSDP", VLDB 16, 2023), where the first part is the one that is never hidden.
    """
    return seconds + (parts - 1) * max(0.0, seconds - behind / parts)
