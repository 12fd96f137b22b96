"""Pretrain the demo's base further on quoting tasks, with a fixed budget of steps and a fixed seed.

    python benches/pretrain_demo_base.py BASE CONVERSATIONS.jsonl OUT

BASE is the checkpoint to start from, CONVERSATIONS.jsonl the public-domain dialogues it was trained on, one
``{"messages": [...]}`` a line. Every step is one batch of quoting tasks, of which only the replies are trained, and two
windows of the public-domain text, so that the language is not forgotten. All weights are trained, in float32: Muon on
the hidden matrices, Adam on the embeddings, router, norms and scales.

Before the first step the scales of the query and key norms are set to ``head_dim ** -0.25``, which divides the
attention logits by ``sqrt(head_dim)``. The starting checkpoint leaves them near 1, as random Gemma-4 models have them:
its attention is nearly one-hot (largest weight 0.8 to 0.95 on average), and hardly learns where to look. After 200
steps the loss on the tasks was 1.02 without this and 0.75 with it, and 0 % and 7 % of the replies were right.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from demo_base_corpus import QuotingTasks, check_demo_is_barred, read_conversations
from moeft.data.collate import PaddingCollator
from sorted_experts import record_routing, use_sorted_experts

SEED = 0
STAGES = ((300, 200), (300, 300))
"""(Length of the learning-rate schedule, steps taken of it), in order. The published base was trained so: the first
stage was cut short, and the second starts from its weights in bfloat16, with fresh optimisers and the same tasks."""
WINDOW = 256
TASKS_PER_STEP = 40
WINDOWS_PER_STEP = 2
TEXT_WEIGHT = 0.5
BALANCE_WEIGHT = 0.01
MUON_RATE, EMBEDDING_RATE, SCALE_RATE = 0.01, 2e-3, 1e-3


class Muon:
    """Momentum whose step is orthogonalised, per matrix of a stack.

    Source:
        https://kellerjordan.github.io/posts/muon/
    """

    def __init__(
        self, parameters: list[Tensor], rate: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        self.parameters, self.rate, self.momentum, self.weight_decay = parameters, rate, momentum, weight_decay
        self.averages = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Move every parameter; ``scale`` is the schedule's factor."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            average.lerp_(parameter.grad, 1 - self.momentum)
            update = orthogonalise(parameter.grad.lerp(average, self.momentum))
            rate = self.rate * scale
            tall = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
            parameter.mul_(1 - rate * self.weight_decay).add_(update, alpha=-rate * tall)


def orthogonalise(x: Tensor, iterations: int = 4) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix; ``x`` is ``[..., rows, columns]``."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalise(x.mT, iterations).mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def main() -> None:
    arguments = parse_arguments()
    check_demo_is_barred()
    torch.set_num_threads(arguments.threads)
    use_sorted_experts()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32).train()
    model.config._experts_implementation = "eager"
    routings = record_routing(model)
    conversations = read_conversations(arguments.conversations)
    soften_attention(model)
    for length, steps in STAGES:
        torch.manual_seed(SEED)
        tasks = QuotingTasks(conversations, SEED)
        windows = text_windows(conversations, tokenizer)
        train(model, tokenizer, tasks, windows, routings, length, steps)
        model.to(torch.bfloat16).float()
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


@torch.no_grad()
def soften_attention(model: nn.Module) -> None:
    """Divide the attention logits by ``sqrt(head_dim)``, by way of the query and key norms."""
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_norm.weight.fill_(attention.head_dim**-0.25)
        attention.k_norm.weight.fill_(attention.head_dim**-0.25)


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    tasks: QuotingTasks,
    windows: Tensor,
    routings: list[tuple[Tensor, Tensor]],
    length: int,
    steps: int,
) -> None:
    """Take ``steps`` steps of a schedule of ``length`` steps."""
    muon, adam = optimizers(model)
    started = time.time()
    for step in range(steps):
        task_loss = loss_of(model, task_batch(tasks, tokenizer))
        task_loss.backward()
        routings.clear()
        rows = [(step * WINDOWS_PER_STEP + index) % len(windows) for index in range(WINDOWS_PER_STEP)]
        text_loss = loss_of(model, {"input_ids": windows[rows], "labels": windows[rows]})
        (TEXT_WEIGHT * text_loss + BALANCE_WEIGHT * balance_loss(routings)).backward()
        routings.clear()

        scale = schedule(step, length)
        for group in adam.param_groups:
            group["lr"] = group["peak_rate"] * scale
        adam.step()
        muon.step(scale)
        model.zero_grad()
        if (step + 1) % 25 == 0:
            seconds = time.time() - started
            print(f"{step + 1:5d}  tasks {task_loss:.3f}  text {text_loss:.3f}  {seconds:.0f} s", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def optimizers(model: nn.Module) -> tuple[Muon, torch.optim.Adam]:
    """Muon for the hidden matrices, Adam for everything else."""
    hidden, tables, scales = [], [], []
    for name, parameter in model.named_parameters():
        if "embed" in name or "router.proj" in name:
            tables.append(parameter)
        elif parameter.ndim >= 2 and "router" not in name:
            hidden.append(parameter)
        else:
            scales.append(parameter)
    groups = [{"params": tables, "peak_rate": EMBEDDING_RATE}, {"params": scales, "peak_rate": SCALE_RATE}]
    return Muon(hidden, MUON_RATE), torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-10)


def schedule(step: int, length: int) -> float:
    """Warm-up over 20 steps, constant for half of the run, then linear down to 3 %."""
    done = step / length
    return min(1.0, (step + 1) / 20) * (1.0 if done < 0.5 else max(0.03, 2 * (1 - done)))


def task_batch(tasks: QuotingTasks, tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """One batch; the line break after a reply is trained too, as it is in the text."""
    examples = []
    for _ in range(TASKS_PER_STEP):
        request, reply = tasks.draw()
        messages = [{"role": "user", "content": request}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        reply_ids = tokenizer(f"{reply}<turn|>\n", add_special_tokens=False)["input_ids"]
        examples.append({"input_ids": prompt_ids + reply_ids, "labels": [-100] * len(prompt_ids) + reply_ids})
    return PaddingCollator(tokenizer.pad_token_id)(examples)


def text_windows(conversations: list[list[dict[str, str]]], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All text in windows ``[N, WINDOW + 1]``, shuffled; the last token of one is the first of another."""
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for text in encoded for token in text])
    windows = tokens.unfold(0, WINDOW + 1, WINDOW)
    return windows[torch.randperm(len(windows))]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the labelled tokens; the head sees no other row."""
    mask = batch.get("attention_mask")
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    cap = model.config.final_logit_softcapping
    logits = torch.tanh(model.lm_head(hidden[labels != -100]) / cap) * cap
    return nn.functional.cross_entropy(logits, labels[labels != -100])


def balance_loss(routings: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Load-balance loss of Switch Transformers, averaged over the layers; 1 when every expert has its share.

    Source:
        https://arxiv.org/abs/2101.03961, equation 4
    """
    losses = []
    for probabilities_TE, index_TK in routings:
        experts = probabilities_TE.shape[-1]
        share_E = torch.bincount(index_TK.flatten(), minlength=experts) / index_TK.numel()
        losses.append(experts * (share_E * probabilities_TE.mean(0)).sum())
    return torch.stack(losses).mean()


if __name__ == "__main__":
    main()
