"""What a run will take, told before anything is read, started or paid for."""

from gendist.planning.answer import Plan as Plan
from gendist.planning.plan import plan_of as plan_of
