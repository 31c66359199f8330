"""A thousand configs, each with a random mistake: legal, or one line, and no misspelt key goes unnoticed."""
import pytest

from mutations import mutation
from rl_mmdet.engine import UserError, add_rl_defaults_, check_training, load_config


@pytest.mark.slow
def test_a_random_mistake_is_legal_or_one_line(parsed, tmp_path):
    settings, told = parsed.to_dict(), 0
    for seed in range(1000):
        text, change, wrong = mutation(settings, seed)
        (tmp_path / 'config.py').write_text(text)
        try:
            texts = check_training(add_rl_defaults_(load_config(
                str(tmp_path / 'config.py'), None, str(tmp_path / 'work'))))
        except UserError as error:
            told += 1
            assert len(str(error).splitlines()) == 1, (seed, change)
        else:
            assert not wrong or any(wrong in each for each in texts), (seed, change)
    assert told > 500
