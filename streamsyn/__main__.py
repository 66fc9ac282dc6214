from streamsyn.cli.main import main

if __name__ == "__main__":  # not in the processes of an export
    main()
