"""The `vigil` command. Everything heavy is imported inside the command that needs it."""

import sys
import uuid
from pathlib import Path
from typing import Annotated

import typer

from config.settings import SettingsError
from db.errors import NodeError
from db.study import WithdrawalReason
from node import administration, models
from node.terminal import (
    FAILED,
    WRONG_USAGE,
    AsJson,
    Config,
    TenantOption,
    complain,
    console,
    hush,
    report,
)

RUN, TRY, STUDIES, ADMIN, MODELS = (
    "Run the node",
    "Try it",
    "Studies",
    "Administration",
    "Models",
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # its tracebacks show local variables: patient data
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A DICOM node that puts calibrated AI triage results back into their study.\n\n"
    "Research software: no medical device, not for primary diagnosis.",
    epilog="Start here: [bold]vigil demo[/]. Exit status: 0 success, 1 failed, "
    "2 wrong usage or configuration.",
)
app.add_typer(administration.users, name="users", rich_help_panel=ADMIN)
app.add_typer(administration.database, name="db", rich_help_panel=ADMIN)
app.add_typer(models.models, name="models", rich_help_panel=MODELS)


def _not_blank(text: str) -> str:
    """An empty shell variable must not select the studies that have no accession number."""
    if not text.strip():
        raise typer.BadParameter("must not be blank")
    return text


def _fit_for_a_note(text: str) -> str:
    from db.withdrawals import BadWords, check_words

    try:
        return check_words(text)
    except BadWords as error:
        raise typer.BadParameter(str(error)) from None


StudyName = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="Accession number, patient ID, any UID or page id; of one study only.",
        callback=_not_blank,
    ),
]


@app.command(rich_help_panel=RUN)
def serve(config: Config = None) -> None:
    """Run everything on this machine: database, receiver, inference, delivery, dashboard.

    Prints one line for each listening address, then `ready`. A stage that dies is started
    again; SIGTERM stops all in order, SIGHUP reloads tenants, destinations and thresholds.
    """
    from node.supervisor import serve as run

    raise typer.Exit(run(config))


@app.command(rich_help_panel=RUN)
def scp(config: Config = None) -> None:
    """Only the receiver: takes studies by C-STORE and writes them to the spool."""
    from scp.__main__ import main as run

    raise typer.Exit(run(config))


@app.command(rich_help_panel=RUN)
def infer(config: Config = None) -> None:
    """Only the inference: judges readiness, scores what is ready. One for each GPU."""
    from inference.__main__ import main as run

    raise typer.Exit(run(config))


@app.command(rich_help_panel=RUN)
def deliver(config: Config = None) -> None:
    """Only the delivery: builds the DICOM objects and sends them."""
    from dicom_sr.__main__ import main as run

    raise typer.Exit(run(config))


@app.command(rich_help_panel=RUN)
def dashboard(config: Config = None) -> None:
    """Only the web pages."""
    from dashboard.__main__ import main as run

    raise typer.Exit(run(config))


@app.command(rich_help_panel=TRY)
def demo(
    study: Annotated[
        list[Path] | None,
        typer.Option("--study", metavar="DIR", help="Send this study as well; repeatable."),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="End when every study has its outcome.")
    ] = False,
    orthanc: Annotated[
        bool, typer.Option("--orthanc", help="Let Orthanc, if installed, be the PACS.")
    ] = False,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Work here and leave it behind.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="A bundle, by name or folder.")
    ] = "ich",
    as_json: AsJson = False,
) -> None:
    """A whole hospital on loopback: two tenants, a PACS, sample studies, results.

    Nothing is installed or changed; everything lives in a temporary folder. Without --once it
    stays up with the dashboard until Ctrl-C.
    """
    from node.demo import Options
    from node.demo import run as run_demo

    options = Options(
        studies=tuple(study or ()),
        once=once,
        orthanc=orthanc,
        keep=keep,
        model=model,
        as_json=as_json,
    )
    raise typer.Exit(run_demo(options))


@app.command(rich_help_panel=TRY)
def send(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder or a ZIP.", exists=True)],
    to: Annotated[
        str, typer.Option("--to", metavar="HOST:PORT", help="The receiver.")
    ] = "127.0.0.1:11112",
    aec: Annotated[str, typer.Option("--aec", metavar="AE", help="Its AE title.")] = "VIGIL",
    aet: Annotated[str, typer.Option("--aet", metavar="AE", help="Ours.")] = "VIGIL_SEND",
    as_json: AsJson = False,
) -> None:
    """C-STORE a folder or a ZIP, as it is, with a progress bar."""
    from node.send_command import run

    raise typer.Exit(run(folder, to=to, called=aec, calling=aet, as_json=as_json))


@app.command(rich_help_panel=TRY)
def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder or a ZIP.", exists=True)],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write the DICOM objects of the result here."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="A bundle, by name or folder."),
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """One study through the same path, without network and database."""
    from node.predict import run

    raise typer.Exit(run(folder, out=out, model=model, as_json=as_json, config=config))


@app.command(rich_help_panel=STUDIES)
def status(as_json: AsJson = False, config: Config = None) -> None:
    """Counts per tenant and state, queue, deliveries, senders, disk, processes."""
    from sqlalchemy.orm import Session

    from config.settings import load
    from node.database import opened
    from node.status import show
    from node.status import status as read

    settings = load(config)
    with opened(settings) as engine, Session(engine) as session:
        report(read(session, settings), show, as_json=as_json)


@app.command(rich_help_panel=STUDIES)
def where(
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT", help="Accession number, patient ID or any UID.", callback=_not_blank
        ),
    ],
    tenant: TenantOption = "",
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Where is my study? Its timeline, from the first slice to the last answer of the PACS."""
    from sqlalchemy.orm import Session

    from config.settings import load
    from node.database import opened
    from node.where import search, show

    settings = load(config)
    with opened(settings) as engine, Session(engine) as session:
        stories = search(session, settings, text, tenant)
    report(stories, show, as_json=as_json)


@app.command(rich_help_panel=STUDIES)
def rerun(
    study: StudyName, tenant: TenantOption = "", as_json: AsJson = False, config: Config = None
) -> None:
    """Analyse a study again, over what is there now; the new result supersedes the old one."""
    from node.operate import rerun as act
    from node.operate import show

    report(act(study, tenant, config), show, as_json=as_json)


@app.command(rich_help_panel=STUDIES)
def resend(
    study: StudyName, tenant: TenantOption = "", as_json: AsJson = False, config: Config = None
) -> None:
    """Send a study's result objects once more, the same bytes, to every destination."""
    from node.operate import resend as act
    from node.operate import show

    report(act(study, tenant, config), show, as_json=as_json)


@app.command(rich_help_panel=STUDIES)
def withdraw(
    study: StudyName,
    reason: Annotated[
        WithdrawalReason, typer.Option("--reason", help="The title of the rejection note.")
    ] = WithdrawalReason.PATIENT_SAFETY,
    words: Annotated[
        str,
        typer.Option(
            "--note", metavar="TEXT", help="Goes into the note; ASCII.", callback=_fit_for_a_note
        ),
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    tenant: TenantOption = "",
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Take back a study's results: a rejection note (IHE IOCM) goes wherever they went.

    What was not sent yet never is. `rerun` makes a new result, which replaces nothing.
    """
    from node.withdraw import Asked, outlook, show
    from node.withdraw import withdraw as act

    if not yes:
        if as_json or not sys.stdin.isatty():
            raise typer.BadParameter("nobody is there to ask: say --yes", param_hint="--yes")
        console().print(outlook(study, tenant, config))
        typer.confirm(f"Withdraw them ({reason})?", abort=True)
    report(act(Asked(study, tenant, reason, words), config), show, as_json=as_json)


DataFolder = Annotated[
    Path,
    typer.Option("--data", metavar="DIR", exists=True, help="manifest.csv and its pictures."),
]
Seed = Annotated[
    int,
    typer.Option("--seed", min=0, max=2**32 - 1, help="The same seed gives the same figures."),
]


@app.command(rich_help_panel=MODELS)
def train(
    data: DataFolder,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The bundle to write.")],
    bundle: Annotated[
        str, typer.Option("--bundle", help="ich, or ich-b4: EfficientNet-B4, taught by ich.")
    ] = "ich",
    seed: Seed = 0,
    folds: Annotated[int, typer.Option("--folds", min=3, help="Outer folds, by patient.")] = 5,
    repeats: Annotated[
        int, typer.Option("--repeats", min=0, help="Judge again with patients parted otherwise.")
    ] = 0,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="FAMILY", help="Candidates of this family alone; repeat."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda or cuda:1.", metavar="NAME")
    ] = "auto",
    remedies: Annotated[
        bool, typer.Option(help="Judge remedies against another scanner, with fits of their own.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Train, calibrate and judge a bundle from labelled slices; a stopped run resumes."""
    from node.learning import train as run

    plan = {
        "seed": seed,
        "folds": folds,
        "repeats": repeats,
        "families": tuple(only or ()),
        "device": device,
        "remedies": remedies,
    }
    raise typer.Exit(run(data, out, bundle, plan, as_json=as_json))


@app.command(rich_help_panel=MODELS)
def evaluate(
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", exists=True, help="manifest.csv and its pictures."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", exists=True, help="8-bit brain-window pictures."),
    ] = None,
    dicom: Annotated[
        Path | None,
        typer.Option("--dicom", metavar="DIR", exists=True, help="DICOM studies, a folder each."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="CSV",
            help="Columns file,label with --images; path,label with --dicom; patient if known.",
        ),
    ] = None,
    window: Annotated[
        str,
        typer.Option("--window", metavar="C/W", help="Of --images, in HU; auto: guessed."),
    ] = "auto",
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="A bundle, by name or folder.")
    ] = "ich",
    to: Annotated[
        Path | None,
        typer.Option("--report", metavar="DIR", help="Write evaluation.html there, too."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores",
            metavar="FILE",
            dir_okay=False,
            help="Write a CSV of each case's label, raw score and probability, as `vigil "
            "calibrate --scores` takes it.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="A site's own, for the bundle's."),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Judge a bundle as it stands on disk, with 95 % intervals over patients."""
    from node.learning import Labelled
    from node.learning import evaluate as run

    cases = Labelled(data=data, images=images, dicom=dicom, labels=labels, window=window)
    raise typer.Exit(
        run(
            model,
            cases,
            seed=seed,
            to=to,
            as_json=as_json,
            calibration=calibration,
            table=scores,
        )
    )


@app.command(rich_help_panel=MODELS)
def calibrate(
    scores: Annotated[
        Path,
        typer.Option(
            "--scores",
            metavar="CSV",
            help="Columns score,label (raw study score; 0 or 1); patient where one has several "
            "studies; study, so that doubles are found.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", dir_okay=False, help="The calibration to write."),
    ],
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="A bundle, by name or folder.")
    ] = "ich",
    label: Annotated[str, typer.Option("--label", help="Default: the primary one.")] = "",
    site: Annotated[str, typer.Option("--site", help="Whose studies, in words.")] = "this site",
    scale: Annotated[
        str,
        typer.Option(
            "--scale",
            metavar="auto|logit|output",
            help="What a score is: a logit, as `predict --json` gives it, or the uncalibrated "
            "output 0..1 of reports; auto: logits, and asks where all lie within 0..1.",
        ),
    ] = "auto",
    prevalence: Annotated[
        float | None,
        typer.Option(
            "--prevalence",
            metavar="SHARE",
            help="The site's share of positive studies, such as 0.06, where negatives are a random "
            "sample. Default: studies are consecutive, and their share is the site's.",
        ),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit a site's own map from raw scores to probabilities; the weights stay as they are.

    Needs 50 positive and 50 negative patients. Negatives must be consecutive or randomly sampled:
    hand-picked ones give probabilities that mean nothing.
    """
    from node.learning import SiteTable
    from node.learning import calibrate as run

    table = SiteTable(scores=scores, scale=scale, prevalence=prevalence, site=site)
    raise typer.Exit(run(model, table, out, label=label, seed=seed, as_json=as_json))


quarantine = typer.Typer(no_args_is_help=True, help="What was set aside, and why.")
app.add_typer(quarantine, name="quarantine", rich_help_panel=STUDIES)


@quarantine.command("list")
def quarantine_list(as_json: AsJson = False, config: Config = None) -> None:
    """Everything that waits for a decision."""
    from node.quarantine import entries, show

    report(entries(config), show, as_json=as_json)


@quarantine.command("discard")
def quarantine_discard(
    entry: Annotated[
        uuid.UUID | None, typer.Argument(metavar="[ID]", help="As `list` shows it.")
    ] = None,
    study: Annotated[
        str,
        typer.Option("--study", metavar="STUDY", help="All that is set aside beside this study."),
    ] = "",
    tenant: TenantOption = "",
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """The newcomer is wrong: the first stays, and the study goes on. The file is kept."""
    from node.quarantine import discard, discard_study, show_decision

    if (entry is None) == (not study.strip()):
        raise typer.BadParameter("give an ID, or --study", param_hint="ID")
    done = discard_study(study, tenant, config) if entry is None else discard(entry, config)
    report(done, show_decision, as_json=as_json)


@quarantine.command("release")
def quarantine_release(
    entry: Annotated[
        uuid.UUID | None, typer.Argument(metavar="[ID]", help="As `list` shows it.")
    ] = None,
    study: Annotated[
        str,
        typer.Option(
            "--study",
            metavar="STUDY",
            help="All that contradicts this study, as a correction of the whole of it.",
        ),
    ] = "",
    tenant: TenantOption = "",
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """The newcomer is right: it joins its study, or takes the place of the first there.

    What it replaces is set aside and can be released again. A study is never made two patients':
    a corrected patient is released with --study, once all of the study has come again.
    """
    from node.quarantine import release, release_study, show_decision

    if (entry is None) == (not study.strip()):
        raise typer.BadParameter("give an ID, or --study", param_hint="ID")
    done = release_study(study, tenant, config) if entry is None else release(entry, config)
    report(done, show_decision, as_json=as_json)


@app.command(rich_help_panel=ADMIN)
def doctor(as_json: AsJson = False, config: Config = None) -> None:
    """Check all that has to work: database, disk, model, peers, certificates, clock."""
    from node.doctor import run

    raise typer.Exit(run(config, as_json=as_json))


def main() -> None:
    """Entry point: errors that the node knows become one line and an exit status."""
    hush()
    try:
        app()
    except SettingsError as error:
        complain(str(error))
        sys.exit(WRONG_USAGE)
    except NodeError as error:
        complain(f"{error.code}: {error}")
        sys.exit(FAILED)
    except Exception as error:
        # By name: SQLAlchemy is not loaded for commands that need no database.
        if type(error).__module__ != "sqlalchemy.exc" or not hasattr(error, "orig"):
            raise
        complain(f"database_away: the database does not answer ({type(error).__name__})")
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
