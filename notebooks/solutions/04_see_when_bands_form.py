"""Solutions to the exercises of 04_see_when_bands_form.ipynb; each takes the place of the stub that raises there."""


# %% Exercise 1
# The timestep of each of 20 steps.
def time_of(st):
    return 1049 - 50 * st


# %% Exercise 2
# The step with the best mean PSNR, and the change of the mean PSNR from there to step 50.
def psnr_story():
    value = frame.groupby("step")["psnr"].mean()
    return value.idxmax(), value[50] - value.max()


# %% Exercise 3
# Network calls of one training step, on average over both windows.
def mean_calls():
    return sum(by_step.steps()) / len(by_step.steps())  # step st takes st calls in all


# %% Exercise 4
# PASD's reward window, as (first, last) step, by the times 0 to 200.
def pasd_reward_window():
    inside = [st for st in range(1, 21) if 0 <= 1001 - 50 * st <= 200]
    return inside[0], inside[-1]  # step 17 is t = 151: the paper's two statements differ there
