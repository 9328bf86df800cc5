"""Make ``dpo.json`` beside this file by the lines of the public scripts that compute the loss of Diffusion-DPO:

python tests/losses/released/make.py TRAIN SD SDXL

where TRAIN is train.py of SalesforceAIResearch/DiffusionDPO (b47678e), SD and SDXL are train_diffusion_dpo.py and
train_diffusion_dpo_sdxl.py of huggingface/diffusers (58eb52c, examples/research_projects/diffusion_dpo).  Of each
script the lines of that part are run; what they ask of networks is given as numbers.
"""

import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
SHAPE = (6, 4, 3, 5)  # three winners, then three losers
SCRIPTS = {  # by convention: which argument, first words, first words after the end, β
    "half-mean": (1, "model_losses = ", "#### END LOSS", 5000.0),
    "mean": (2, "model_losses = ", "accelerator.backward", 2500.0),
    "half-mean, SDXL": (3, "model_losses = ", "accelerator.backward", 2000.0),
}


def numbers(shape=SHAPE) -> dict[str, torch.Tensor]:
    """Outputs near each other, as after some training; NumPy's bits, and no logarithms or sines, on every machine."""
    draw = np.random.default_rng(0).random
    target = torch.from_numpy(draw(shape).astype(np.float32) * 4 - 2)
    reference = target + torch.from_numpy(draw(shape).astype(np.float32) - 0.5)
    return {"target": target, "reference": reference,
            "output": reference + torch.from_numpy(draw(shape).astype(np.float32) - 0.5) / 500}  # fmt: skip


def lines(path: str, first: str, after: str) -> str:
    text = Path(path).read_text().splitlines()
    begin = next(i for i, line in enumerate(text) if line.strip().startswith(first))
    end = next(i for i in range(begin, len(text)) if text[i].strip().startswith(after))
    return textwrap.dedent("\n".join(text[begin:end]))


def main() -> None:
    found = {}
    for name, (argument, first, after, beta) in SCRIPTS.items():
        given = numbers()
        output = given["output"].requires_grad_()
        unet = MagicMock(return_value=SimpleNamespace(sample=given["reference"]))
        names = {
            "torch": torch, "F": F, "args": SimpleNamespace(beta_dpo=beta, loss_type="sigmoid"), "model_pred": output,
            "target": given["target"], "unet": unet, "ref_unet": unet, "accelerator": MagicMock(),
            "model_batch_args": (), "added_cond_kwargs": None,
        } | dict.fromkeys(  # what the networks would be given
            ("noisy_model_input", "timesteps", "encoder_hidden_states", "prompt_embeds", "add_time_ids",
             "pooled_prompt_embeds")
        )  # fmt: skip
        exec(lines(sys.argv[argument], first, after), names)
        names["loss"].backward()
        found[name] = {
            "beta": beta,
            "loss": names["loss"].item(),
            "accuracy": names["implicit_acc"].item(),
            "gradient": output.grad.flatten()[::7].tolist(),
        }
    (HERE / "dpo.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
