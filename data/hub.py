# SPDX-License-Identifier: MIT
"""Whether the hub answers, found out once: without a network, libraries try again for a minute."""

import os

import huggingface_hub


def ask_hub(config):
    """Where a name is not on this disk, ask the hub, and go offline where it does not answer.

    alphapo.py calls this before it imports datasets, which looks then whether it may use the hub.
    """
    if not all(map(os.path.exists, (config.model, config.data, config.eval_data or config.data))):
        try:
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        except Exception:
            os.environ["HF_HUB_OFFLINE"] = "1"
            huggingface_hub.constants.HF_HUB_OFFLINE = True
