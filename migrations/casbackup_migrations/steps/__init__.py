"""One module per change of the format, frozen once released.

To add the step from format N to N+1, raise ``FORMAT`` in ``casbackup/spec/config.py`` and add one file here,
``from_N_to_N+1.py``, that ends with::

    STEP = Step(from_format=N, title="what it does, for people", change=change, new_config=new_config)

It is found by its name. The rules:

1. **It imports nothing current**: of casbackup only ``errors``, ``fs``, ``clock`` and ``units``
   (import-linter checks that), and ``step`` beside it. What it must know about layouts, records or databases
   of the old and of the new format it holds as copies, because the originals will change.
2. **It never changes again.** A fault in a released step is cured by the next one, unless no repository can
   have got past it.
3. ``change`` **can be run again** after a crash at any point, and after it had finished: it looks at what is
   there and does the rest. Nothing is changed in place: it writes the new file (``write_durably``), then
   removes the old one.
4. ``change`` **loses nothing**: what it removes is, in the new form, durable before.
5. **Everything is durable when** ``change`` **returns**: files synced, then the folders that name them. The
   number in config.json is written after that, by the executor; it alone says which format a repository has.
   So ``change`` never writes config.json: new fields come from ``new_config``, a function of the old content.
6. The repository is locked exclusively meanwhile: no backup, restore or gc runs. There may be parked
   sessions, packs that were never sealed, leftovers of crashes, and files that do not belong there.
7. The index can be rebuilt. A step that would have to rewrite all of it may rather remove it durably and let
   the rebuild do it, if sessions and verification times may go.
8. Memory is bounded: no step loads all snapshots or all blobs at once.
9. It comes with a golden repository of the format that it starts from (``tests/golden/``), and with a test
   that crashes it at every operation of the file system.
"""
