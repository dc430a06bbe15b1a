"""`python -m attnengine.demo` is `attnengine demo`."""

from . import main

raise SystemExit(main())
