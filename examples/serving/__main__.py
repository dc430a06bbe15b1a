from .display import main

raise SystemExit(main())
