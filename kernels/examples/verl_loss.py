"""verl's ``vanilla`` policy loss from ctrl_kernels, one launch in the place of some thirty.

    import verl_loss; verl_loss.register()          # where verl's workers start
    actor_rollout_ref.actor.policy_loss.loss_mode=ctrl_kernels

verl's log-probs are replaced likewise: ``ctrl_kernels.linear_token_logprobs`` has the arguments of verl's
``linear_cross_entropy(hidden, weight, labels, temperature, "none", group)``.
"""

import ctrl_kernels


def policy_loss(
    old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, rollout_is_weights=None
):
    """Loss and metrics as verl's trainer wants them; its aggregations have the names of ours."""
    tokens = config.global_batch_info.get("batch_num_tokens")
    sequences = config.global_batch_info.get("global_batch_size")
    share = config.global_batch_info.get("dp_size", 1)  # verl averages over data-parallel ranks afterwards
    denominator = tokens if loss_agg_mode == "token-mean" else sequences
    loss, metrics = ctrl_kernels.policy_loss(
        log_prob, old_log_prob, advantages, response_mask, importance_weights=rollout_is_weights,
        clip_low=config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        clip_high=config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
        dual_clip=config.get("clip_ratio_c", 3.0), aggregation=loss_agg_mode, denominator=denominator,
    )  # fmt: skip
    names = {"pg_clipfrac": "clip_fraction", "ppo_kl": "approx_kl", "pg_clipfrac_lower": "dual_clip_fraction"}
    return loss * share, {f"actor/{theirs}": metrics[ours].item() for theirs, ours in names.items()}


def register() -> None:
    """Make it known to verl."""
    from verl.trainer.ppo.core_algos import register_policy_loss

    register_policy_loss("ctrl_kernels")(policy_loss)
