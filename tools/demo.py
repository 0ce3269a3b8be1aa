"""The demo: see main()."""
