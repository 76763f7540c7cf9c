import time, torch
import evaluate
from arc_data import test_contexts, collate
def test_x(make_lab, tasks):
    lab = make_lab("--weight-decay","0","--lr","1e-2","--batch-size","8","--augment","none")
    items = test_contexts(tasks, {t.id:i for i,t in enumerate(tasks)})
    t=time.time()
    for n in range(100):
        r = lab.step(n, rewarded=False, progress=4)
        if n%10==9:
            lab.system.eval()
            query,_=collate([c for c,_ in items])
            p=evaluate.predict(lab.system,query,lab.runtime)
            with torch.no_grad():
                scene=lab.system.observe(query); sizes=scene.sizes(); side=max(6,int(sizes.max()))
                side=evaluate.canvas_for(sizes)
                reading,_=lab.system.read(query,scene,sizes,side)
                a=lab.system.plan(scene,reading,scene.embedding); b=lab.system.plan(scene,reading,scene.embedding.roll(1,0))
            d=(a.final()-b.final())[a.mask].abs()
            ch=(evaluate.decode(a)!=evaluate.decode(b)).sum()
            print(n, float(r.total.detach()), "dlogit", float(d.max()), float(d.mean()), "changed", int(ch), int(a.mask.sum()), time.time()-t)
            lab.system.train()
    assert 0
