"""Solutions to the exercises of 17_learn_from_pairs.ipynb; each takes the place of the stub that raises there."""


# %% Exercise 1
# The β of `half-mean` that is β = 0.02 of `sum` for latents of 16×64×64.
def beta_of_half_mean():
    return 0.02 * 2 * 16 * 64 * 64  # "sum" has no ½, and a sum is n means


# %% Exercise 2
# The β with which the toy's training ends where the quality is best.
def best_beta():
    return u  # training ends at m = u / β, and quality is best at m = 1


# %% Exercise 3
# The gradient of the DPO loss plus the denoising loss of the winners.
def anchored_gradient(output, reference, target, beta, weight, anchor):
    gradient = gradient_by_hand(output, reference, target, beta, weight)
    gradient[0] += anchor * 2 * (output[0] - target[0]) / output[0].numel()
    return gradient
