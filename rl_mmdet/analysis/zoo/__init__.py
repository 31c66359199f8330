"""mmdet's model zoo, tried out: which of its configs run with replaced backbones."""
from .check import Result, check_config
from .configs import ZooConfig, config_names, read_config
from .coverage import Outcome, check_configs, require_all
from .page import coverage_page, summary
from .sample import sample
from .swap import swap_backbones

__all__ = ['Outcome', 'Result', 'ZooConfig', 'check_config', 'check_configs', 'config_names', 'coverage_page',
           'read_config', 'require_all', 'sample', 'summary', 'swap_backbones']
