from pathlib import Path
import pytest, tempfile
def go(rank, world, folder):
    from tests.verify import test_certify as t
    folder=Path(folder)
    out={"right":t._certified(folder/"r",[*t._MUON,*t._GROUPS])}
    for m in t.OPTIONS:
        with pytest.MonkeyPatch.context() as p:
            m(p)
            out[m.__name__]=t._certified(folder/m.__name__,t.OPTIONS[m])
    return out
if __name__=="__main__":
    from tests.distributed.harness import run_distributed_test
    r=run_distributed_test(go,4,tempfile.mkdtemp(),timeout_s=500)[0]
    for k,v in r.items(): print(k,[(c.name,c.error) for c in v if not c.passed], len(v))
