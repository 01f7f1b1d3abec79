"""What many programs import, and what the harness needs: loaded once in the runner of a jail that many programs use."""

from __future__ import annotations

import bisect  # noqa: F401
import collections  # noqa: F401
import copy  # noqa: F401
import datetime  # noqa: F401
import fractions  # noqa: F401
import functools  # noqa: F401
import heapq  # noqa: F401
import itertools  # noqa: F401
import json  # noqa: F401
import math  # noqa: F401
import operator  # noqa: F401
import random  # noqa: F401  (each fork seeds it anew)
import re  # noqa: F401
import statistics  # noqa: F401
import string  # noqa: F401
import typing  # noqa: F401

import checker  # noqa: F401
import files  # noqa: F401
import solution  # noqa: F401
