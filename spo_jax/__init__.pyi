"""What ``__init__.py`` imports when first used, for editors and type checkers."""

from spo_jax.config import (
    Config as Config,
)
from spo_jax.config import (
    load_config as load_config,
)
from spo_jax.dynamics.bandit import (
    Bandit as Bandit,
)
from spo_jax.dynamics.bandit import (
    log_policy as log_policy,
)
from spo_jax.dynamics.bandit import (
    make_bandit_levels as make_bandit_levels,
)
from spo_jax.dynamics.bandit import (
    make_shift_bandit as make_shift_bandit,
)
from spo_jax.dynamics.bandit import (
    masses as masses,
)
from spo_jax.dynamics.bandit import (
    simulate as simulate,
)
from spo_jax.dynamics.law import (
    law_terms as law_terms,
)
from spo_jax.dynamics.law import (
    make_exact_law as make_exact_law,
)
from spo_jax.dynamics.law import (
    make_head_law as make_head_law,
)
from spo_jax.dynamics.law import (
    make_mass as make_mass,
)
from spo_jax.losses import (
    LOSSES as LOSSES,
)
from spo_jax.losses import (
    UNPAIRED_LOSSES as UNPAIRED_LOSSES,
)
from spo_jax.losses import (
    PairLogprobs as PairLogprobs,
)
from spo_jax.losses import (
    UnpairedLogprobs as UnpairedLogprobs,
)
from spo_jax.losses import (
    alphadpo_loss as alphadpo_loss,
)
from spo_jax.losses import (
    chosen_hinge as chosen_hinge,
)
from spo_jax.losses import (
    cpo_loss as cpo_loss,
)
from spo_jax.losses import (
    dpo_loss as dpo_loss,
)
from spo_jax.losses import (
    dpop_loss as dpop_loss,
)
from spo_jax.losses import (
    ipo_loss as ipo_loss,
)
from spo_jax.losses import (
    kto_loss as kto_loss,
)
from spo_jax.losses import (
    make_preference_loss as make_preference_loss,
)
from spo_jax.losses import (
    rdpo_loss as rdpo_loss,
)
from spo_jax.losses import (
    simpo_loss as simpo_loss,
)
from spo_jax.losses import (
    slic_loss as slic_loss,
)
from spo_jax.losses import (
    token_mean_nll as token_mean_nll,
)
from spo_jax.models import (
    Execution as Execution,
)
from spo_jax.models import (
    Model as Model,
)
from spo_jax.models import (
    init_model as init_model,
)
from spo_jax.models import (
    load_model as load_model,
)
from spo_jax.models import (
    load_params as load_params,
)
from spo_jax.models import (
    save_pretrained as save_pretrained,
)
from spo_jax.objective import (
    Objective as Objective,
)
from spo_jax.objective import (
    completion_logprobs as completion_logprobs,
)
from spo_jax.objective import (
    loss_coefficients as loss_coefficients,
)
from spo_jax.objective import (
    make_head_gradients as make_head_gradients,
)
from spo_jax.objective import (
    make_logprobs_fn as make_logprobs_fn,
)
from spo_jax.objective import (
    make_objective as make_objective,
)
from spo_jax.objective import (
    predictor_states as predictor_states,
)
from spo_jax.objective import (
    scored_mask as scored_mask,
)
from spo_jax.objective import (
    token_logprobs as token_logprobs,
)
from spo_jax.objective import (
    token_spread as token_spread,
)
from spo_jax.parallel import (
    make_mesh as make_mesh,
)
from spo_jax.parallel import (
    place_batch as place_batch,
)
from spo_jax.parallel import (
    tree_shardings as tree_shardings,
)
from spo_jax.policies import (
    distinct_n as distinct_n,
)
from spo_jax.policies import (
    generate as generate,
)
from spo_jax.policies import (
    repetition as repetition,
)
from spo_jax.report import (
    make_report as make_report,
)
from spo_jax.sampling.make_pairs import (
    PairSettings as PairSettings,
)
from spo_jax.sampling.make_pairs import (
    pairs_of_samples as pairs_of_samples,
)
from spo_jax.sampling.make_pairs import (
    write_pairs as write_pairs,
)
from spo_jax.solvers import (
    SOLVERS as SOLVERS,
)
from spo_jax.solvers import (
    Levels as Levels,
)
from spo_jax.solvers import (
    Solver as Solver,
)
from spo_jax.solvers import (
    SolverState as SolverState,
)
from spo_jax.solvers import (
    make_alternating as make_alternating,
)
from spo_jax.solvers import (
    make_dynamic_barrier as make_dynamic_barrier,
)
from spo_jax.solvers import (
    make_inner_only as make_inner_only,
)
from spo_jax.solvers import (
    make_levels as make_levels,
)
from spo_jax.solvers import (
    make_max_level as make_max_level,
)
from spo_jax.solvers import (
    make_optimizer as make_optimizer,
)
from spo_jax.solvers import (
    make_penalty as make_penalty,
)
from spo_jax.solvers import (
    make_preference_only as make_preference_only,
)
from spo_jax.solvers import (
    make_primal_dual as make_primal_dual,
)
from spo_jax.solvers import (
    make_projected as make_projected,
)
from spo_jax.solvers import (
    make_random_level as make_random_level,
)
from spo_jax.solvers import (
    make_schedule as make_schedule,
)
from spo_jax.solvers import (
    make_solver as make_solver,
)
from spo_jax.solvers import (
    make_unrolled as make_unrolled,
)
from spo_jax.solvers import (
    make_unrolled_first_order as make_unrolled_first_order,
)
from spo_jax.study import (
    make_study_page as make_study_page,
)
from spo_jax.study import (
    read_evidence as read_evidence,
)
from spo_jax.study import (
    read_study as read_study,
)
from spo_jax.study import (
    run_study as run_study,
)
from spo_jax.tasks import (
    TASKS as TASKS,
)
from spo_jax.tasks import (
    Task as Task,
)
from spo_jax.training.run import (
    judge_start as judge_start,
)
from spo_jax.training.run import (
    train as train,
)
from spo_jax.training.update import (
    init_state as init_state,
)
from spo_jax.training.update import (
    jit_step as jit_step,
)
from spo_jax.training.update import (
    make_train_step as make_train_step,
)
from spo_jax.training.update import (
    shard_state as shard_state,
)
from spo_jax.types import (
    BilevelBatch as BilevelBatch,
)
from spo_jax.types import (
    CompletionBatch as CompletionBatch,
)
from spo_jax.types import (
    PreferenceBatch as PreferenceBatch,
)
from spo_jax.types import (
    PreferenceRow as PreferenceRow,
)
from spo_jax.types import (
    Segments as Segments,
)
from spo_jax.types import (
    SFTBatch as SFTBatch,
)
from spo_jax.types import (
    SFTRow as SFTRow,
)
from spo_jax.types import (
    TrainState as TrainState,
)
from spo_jax.types import (
    UnpairedRow as UnpairedRow,
)

__version__: str
