"""Which release is a candidate, in staging, in production: decided in the release store, shown by the model registry.

Beside a model's releases lies its history, ``MODEL/.promotion/history/00000001.json`` and so on. A promotion is one
more entry of it, and nothing else: creating an entry's key, which never exists twice, is the compare-and-swap, and the
newest entry is the pointer, as it repeats what every alias stands at. MLflow's aliases and tags are written afterwards
and follow it; `reconcile` makes up for a crash in between.

    history       entries, their chain of digests, appending one
    timeline      what an alias stood at at a given time, although clocks disagree
    approval      decisions of people, with identity and expiry
    policy        promotion.yaml: who has to approve what, and who is told
    signature     whose signature is demanded, and whether it is there
    notify        a signed webhook, a command
    deliveries    who was told of which entry, so that what failed is told later
    place         the store that has the history
    rules         candidate, staging, production
    releases      the bytes that versions stand for
    promoter      promote, roll back
    reconciliation  the registry made to follow, and told what nobody was told
"""
