"""Checks of numbers: what is taken as it is, and what the message of a refusal says."""
import math

import pytest

from rl_mmdet.replacement.checks import check_number


@pytest.mark.parametrize(('value', 'bounds'), [
    (3, dict(whole=True)), (2, dict(whole=True, least=2)), (-0.5, {}), (1, dict(above=0, most=1)),
    (0, dict(least=0, below=1))])
def test_what_is_allowed_comes_back(value, bounds):
    assert check_number('x', value, **bounds) is value


@pytest.mark.parametrize(('value', 'bounds', 'said'), [
    (2.0, dict(whole=True), 'an integer, got 2.0'),
    (1, dict(whole=True, least=2), 'an integer of at least 2, got 1'),
    (4, dict(whole=True, least=0, most=3), 'an integer of at least 0 and at most 3, got 4'),
    (0, dict(above=0, most=1), 'a number above 0 and at most 1, got 0'),
    (1, dict(least=0, below=1), 'a number at least 0 and below 1, got 1'),
    ('0.5', {}, "a finite number, got '0.5'"), (True, {}, 'a finite number, got True'), (None, {}, 'got None'),
    (math.nan, {}, 'got nan'), (math.inf, dict(above=0), 'got inf'), (True, dict(whole=True), 'got True')])
def test_what_is_not_names_the_number_the_value_and_the_bounds(value, bounds, said):
    with pytest.raises(ValueError, match=f'Plan: x must be .*{said}$'):
        check_number('Plan: x', value, **bounds)


def test_hint_is_appended():
    with pytest.raises(ValueError, match=r'got 1 \(k=2 replaces every other\)$'):
        check_number('k', 1, whole=True, least=2, hint='k=2 replaces every other')
