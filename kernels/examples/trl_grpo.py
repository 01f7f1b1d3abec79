"""TRL's GRPO with its log-probs and its loss from ctrl_kernels: the same training, less memory.

    trainer = KernelGRPOTrainer(model=..., reward_funcs=..., args=GRPOConfig(...), train_dataset=...)

For text models whose hidden states are ``model.model(...)`` and whose output layer is ``model.lm_head`` (Qwen, Llama),
and for the losses grpo, bnpo and dr_grpo without vLLM's corrections.
"""

import torch
from trl import GRPOTrainer

import ctrl_kernels

AGGREGATIONS = {"grpo": "seq-mean-token-mean", "bnpo": "token-mean", "dr_grpo": "seq-mean-token-sum"}


class KernelGRPOTrainer(GRPOTrainer):
    """``GRPOTrainer``, two methods replaced."""

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **_
    ):
        """Log-probs and entropies [B, T] of the completions, never holding their logits."""
        model = self.accelerator.unwrap_model(model)
        hidden = model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        targets = input_ids[:, -logits_to_keep:]
        logprobs, entropy = ctrl_kernels.linear_token_logprobs(
            hidden[:, -logits_to_keep - 1 : -1].flatten(0, 1), model.lm_head.weight, targets.flatten(),
            temperature=self.temperature, return_entropy=True,
        )  # fmt: skip
        return logprobs.view(targets.shape), entropy.view(targets.shape) if compute_entropy else None, None

    def _compute_loss(self, model, inputs):
        """The loss of a batch, and what TRL logs."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length, mask = inputs["completion_ids"].shape[1], inputs["completion_mask"]
        logprobs, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, length, compute_entropy=True
        )
        old = inputs.get("old_per_token_logps")
        denominator = len(mask) * (self.max_completion_length if self.loss_type == "dr_grpo" else 1)
        loss, metrics = ctrl_kernels.policy_loss(
            logprobs, logprobs.detach() if old is None else old, inputs["advantages"], mask, entropy=entropy.detach(),
            clip_low=self.epsilon_low, clip_high=self.epsilon_high, ratio=self.importance_sampling_level,
            ref_logprobs=inputs.get("ref_per_token_logps"), kl_coef=self.beta,
            kl_correction=self.args.use_bias_correction_kl, aggregation=AGGREGATIONS[self.loss_type],
            denominator=None if self.loss_type == "bnpo" else float(denominator),
        )  # fmt: skip
        for name in ("clip_fraction", "entropy", "kl"):
            self._metrics["train" if self.model.training else "eval"][name].append(metrics[name].item())
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1)
