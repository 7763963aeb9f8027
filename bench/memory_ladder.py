"""Memory of the algorithms against the size of a RoBERTa-shaped model (paper, Figure 1, bottom right)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import sama_kernels as sk
from bench.algorithm_cases import ATTENTION, Task, ours
from sama_experiments.common.memory import peak_bytes

Row = dict[str, Any]
SIZES = ((64, 2), (128, 2), (256, 4), (384, 4))  # width and layers: 3 to 27 million parameters; base is (768, 12)
QUICK = ((32, 1), (64, 2))
VOCABULARY = {False: 50265, True: 500}
PLAIN = "plain finetuning"


class RobertaTask(Task):
    """`Task` on a RoBERTa with random weights; a head per 64 of the width."""

    def __init__(self, size: tuple[int, int], vocabulary: int, batch: int, tokens: int, device: torch.device) -> None:
        import transformers

        super().__init__("toy", batch, tokens, device, ATTENTION)
        width, layers = size
        config = transformers.RobertaConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64),
            intermediate_size=4 * width, max_position_embeddings=514, type_vocab_size=1, num_labels=2,
            attn_implementation=ATTENTION,
        )  # fmt: skip
        self.net = transformers.RobertaForSequenceClassification(config).to(device).train()
        self.ids = torch.randint(5, vocabulary, (2, batch, tokens), device=device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-5)
        self.recorded_base_loss = sk.recorded(self.base_loss)


def ladder(terms: int, batch: int, tokens: int, quick: bool, device: torch.device) -> Iterator[Row]:
    """A row per size and algorithm of ours: live bytes at the peak of its step, everything that stays included."""
    for width, layers in QUICK if quick else SIZES:
        task = RobertaTask((width, layers), VOCABULARY[quick], batch, tokens, device)
        for _ in range(2):
            task.weighted_step()
        kept = [*task.net.parameters(), *task.net.buffers()]
        kept += [t for s in task.optimizer.state.values() for t in s.values()]
        fixed = sum(t.numel() * t.element_size() for t in kept)
        grads = sum(p.grad.numel() * p.grad.element_size() for p in task.net.parameters() if p.grad is not None)
        parameters = sum(p.numel() for p in task.net.parameters())
        task.optimizer.zero_grad()
        plain = fixed + peak_bytes(task.plain_step, device)[0]
        peaks = {PLAIN: plain}
        for case in ours(task, terms, (1,)):
            peaks[case.name] = max(plain, fixed + grads + peak_bytes(case.meta, device)[0])
        for name, peak in peaks.items():
            yield {
                "record": "ladder",
                "width": width,
                "layers": layers,
                "parameters": parameters,
                "name": name,
                "live_bytes": peak,
                "memory_of_plain": peak / plain,
            }
