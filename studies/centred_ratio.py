"""What a centred ratio does: DDPO-IS with the mean of log p_theta / p_old added back in, as in GRPO-Guard.

    python studies/centred_ratio.py --reward compressibility --seed 100    # train.py's flags

x_{t-1} was drawn with mean mu_old. So log p_theta / p_old = (x_{t-1} - mu_old) (mu - mu_old) / sigma^2 -
(mu - mu_old)^2 / (2 sigma^2), averaged over the dimensions. The second part is minus the KL of the two
policies. It makes most ratios smaller than 1, whatever the advantage, and the low side of the clip then holds
the policy back (ddpo.py, 8). Here it is added back in (arXiv 2510.22319). It costs a pass of the old policy.
"""
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the method is, if run as a script
import ddpo
import train
from sampling import score


def centred_score(policy, trajectory, images, k):
    """As sampling.score, with the KL to policy.reference, the old policy, added to log p_theta."""
    log_probs, kl = score(policy, trajectory, images, k)
    return log_probs + kl, torch.zeros_like(kl)


def centred_update(policy, *arguments, **options):
    """As ddpo.ddpo_update."""
    ddpo.score, old, policy.reference = centred_score, ddpo.score, policy.weights()
    try:
        return ddpo.ddpo_update(policy, *arguments, **options)
    finally:
        ddpo.score, policy.reference = old, None


if __name__ == "__main__":
    if given := {flag.split("=")[0] for flag in sys.argv} & {"--algorithm", "--kl-weight"}:
        sys.exit(f"centred_ratio.py is DDPO-IS with a KL to the old policy: leave out {' and '.join(given)}")
    coefficients, _, keeps_chain = train.ALGORITHMS["ddpo-is"]
    train.ALGORITHMS["ddpo-is"] = coefficients, partial(centred_update, loss=ddpo.clipped_loss), keeps_chain
    sys.exit(train.main())
