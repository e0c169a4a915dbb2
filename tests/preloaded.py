"""What the fork server of tests has ready beside its imports: ranks that compose configs begin with the defaults."""

from moecompile.compose.hydra_state import own_hydra
from moecompile.compose.typed import _schema
from tests.composed import of_groups

_schema()
with own_hydra():
    of_groups(())
