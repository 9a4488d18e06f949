"""The list of faults, by rooms of the package."""

from tests.sabotage.faults.artifacts import ARTIFACTS
from tests.sabotage.faults.attacks import ATTACKS
from tests.sabotage.faults.data import DATA
from tests.sabotage.faults.evaluation import EVALUATION
from tests.sabotage.faults.exchange import EXCHANGE
from tests.sabotage.faults.machine import MACHINE
from tests.sabotage.faults.model import MODEL
from tests.sabotage.faults.shapes import SHAPES
from tests.sabotage.faults.training import TRAINING
from tests.sabotage.faults.tuning import TUNING

FAULTS = (*TRAINING, *TUNING, *MODEL, *DATA, *ARTIFACTS, *EVALUATION, *EXCHANGE, *MACHINE, *SHAPES, *ATTACKS)
