# The commands of README, Install and "First prune" as they stand, each page in an environment that
# its own first line makes. `make start-test` calls this. Downloads the libraries twice, and a model.
#
#     sh start_pages.sh FOLDER
set -e
rm -rf "$1"
mkdir -p "$1/clone/HuggingFaceTB"
git ls-files -z | xargs -0 cp --parents -t "$1/clone"
cd "$1"
ln -s ../smollm2 clone/HuggingFaceTB/SmolLM2-135M-Instruct  # no hub is needed

# Arguments: a name of the environment, and commands. `make` has environments of its own.
in_environment() {
    test -d "$1" || "${PYTHON:-python3}" -m venv "$1"
    commands=$(echo "$2" | grep -v '^make ')
    (PATH="$PWD/$1/bin:$PATH" && cd clone && bash -exc "$commands")
}

of_page() {
    sed -n '/^```sh$/,/^```$/{/^```/!p}' "clone/$1"
}

in_environment start "$(of_page docs/start/install.md)"
in_environment start "$(of_page docs/start/first-prune.md)"
rm -r clone/pruned  # the README takes the same name
in_environment readme "$(of_page README.md | sed '/^prunus prune/q')"
