"""What the fork server of tests has ready beside its imports: ranks that compose configs begin with the defaults."""

import os

from moecompile.compose.hydra_state import CONFIG_DIR_VARIABLE, own_hydra
from moecompile.compose.typed import _schema
from tests.composed import of_groups

_schema()
if not os.environ.get(CONFIG_DIR_VARIABLE):  # of the test that happens to start the server
    with own_hydra():
        of_groups(())
