"""Where conditions come from, one file a source. Each turns a batch into rows of vectors (C, P, d).

A source is a module made from (config, prefix rows, what the run can condition on). It states its number of `rows`,
and its forward gives (conditions (C, rows, d), the condition of each sample (B,), -1 for none). Nothing downstream asks
where rows came from: to add a source, write its file, name it here and in config.HypernetConfig.conditions.
"""

from hyperpelt_ds.hypernet.conditions.description import DescriptionCondition
from hyperpelt_ds.hypernet.conditions.image import ImageCondition
from hyperpelt_ds.hypernet.conditions.task import TaskCondition

SOURCES = {"task": TaskCondition, "image": ImageCondition, "description": DescriptionCondition}

__all__ = ["SOURCES", "DescriptionCondition", "ImageCondition", "TaskCondition"]
