//! The command line: verbs, flags, and the examples that each `--help` begins with.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as Arguments, Parser, Subcommand};
use clap_complete::Shell;

use crate::bench;
use crate::output::{Color, Mode};

/// What comes first is what most people look for: what it does, then how it is typed.
const TEMPLATE: &str =
    "{about-with-newline}\n{before-help}{usage-heading} {usage}\n\n{all-args}{after-help}\n";

/// The room where agents talk: a host, workers made of any program, and callers.
#[derive(Debug, Parser)]
#[command(
    name = "parlour",
    version,
    arg_required_else_help = true,
    help_template = TEMPLATE,
    before_help = "\
Examples:
  parlour demo                                   see it all work, in one command
  parlour serve --memory                         keep a room on 127.0.0.1:9000
  parlour worker upper -- tr a-z A-Z             any program is an agent
  parlour call upper 'hello'                     and anyone can call it",
    after_help = "\
Exit codes:
  0 ok   1 failed   2 usage   3 not found   4 denied   5 conflict   6 timeout
  7 cannot connect   8 partly failed   74 storage   75 already running
  78 bad configuration
  130 interrupted   143 terminated"
)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// Flags of every verb.
#[derive(Clone, Copy, Debug, Arguments)]
#[command(next_help_heading = "Output")]
pub(crate) struct Common {
    /// How data is written to stdout [default: text; of `subscribe`: jsonl]
    #[arg(
        long,
        global = true,
        value_name = "text|json|jsonl",
        hide_possible_values = true,
        conflicts_with = "json"
    )]
    output: Option<Mode>,
    /// Short for --output json
    #[arg(long, global = true)]
    json: bool,
    /// Say nothing on stderr but errors
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// Whether to use colours
    #[arg(
        long,
        global = true,
        value_name = "auto|always|never",
        hide_possible_values = true,
        default_value = "auto"
    )]
    pub(crate) color: Color,
}

impl Common {
    pub(crate) fn mode(&self) -> Option<Mode> {
        if self.json { Some(Mode::Json) } else { self.output }
    }
}

/// Where the host is, and how to be let in.
#[derive(Clone, Debug, Arguments)]
#[command(next_help_heading = "Host")]
pub(crate) struct Client {
    /// Where the host is
    #[arg(long, env = "PARLOUR_URL", default_value = "http://127.0.0.1:9000")]
    pub(crate) url: String,
    /// File with the token that the host asks for
    #[arg(long, env = "PARLOUR_TOKEN_FILE", value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Shows a room at work, in one command
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour demo            stays up afterwards, for you to try things
  parlour demo --once     ends, with 0 if all went as it should")]
    Demo(Demo),
    /// Keeps a room: serves callers and workers until it is told to stop
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour serve --memory
  parlour serve --listen 127.0.0.1:0                  a free port, named on stderr
  parlour serve --listen 0.0.0.0:9000 --token-file token
  parlour serve --set limits.payload_bytes=4MiB       `parlour config show` lists all settings

SIGTERM or SIGINT: calls in flight may finish, then it ends. A second signal ends it at once.")]
    Serve(Serve),
    /// Serves an agent type with a program: payload on its stdin, reply on its stdout
    #[command(help_template = TEMPLATE, override_usage = "\
parlour worker [OPTIONS] <TYPE> -- <COMMAND>...
       parlour worker [OPTIONS] <TYPE> --echo", before_help = "\
Examples:
  parlour worker upper -- tr a-z A-Z
  parlour worker summary --content-type application/json -- python3 summary.py
  parlour worker echo --echo                          answers with what it got

The program finds PARLOUR_KEY, PARLOUR_DATA_TYPE, PARLOUR_ATTEMPT, PARLOUR_CONVERSATION,
PARLOUR_CAUSE, PARLOUR_HOPS, PARLOUR_URL and PARLOUR_META_NAME in its environment. If it exits
with anything but 0, the caller gets what it wrote to stderr. It runs without a shell; use
`sh -c '…'` for one.")]
    Worker(Worker),
    /// Calls an agent and prints its reply, and nothing else, on stdout
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour call upper 'hello'
  parlour call summary/report-7 @report.txt --timeout 2m
  date | parlour call upper -
  parlour call pricing '{\"sku\": 7}' --content-type application/json --meta tenant=acme")]
    Call(Call),
    /// Has a message accepted for later, and prints the id under which to look for it
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour send report/july @july.csv                  prints an id once it is on the disk
  parlour send report/july @july.csv --wait 10m       prints the reply when it is there
  parlour send invoice/7 '{}' --key invoice-7         the same key twice is accepted once
  parlour send reminder/ada 'stand up' --delay 1h --ttl 2h")]
    Send(Send),
    /// Shows what became of messages that were accepted for later
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour deliveries ls --state waiting
  parlour deliveries show 3-9f2c11aa-512              with every step of its life
  parlour deliveries wait 3-9f2c11aa-512              prints its reply when it is there
  parlour deliveries cancel 3-9f2c11aa-512 --reason 'ordered twice'")]
    Deliveries(Deliveries),
    /// Shows what failed for good, sends it back or gives it up
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour dead-letters ls --agent-type report
  parlour dead-letters show 3-9f2c11aa-512            why, and what was to be delivered
  parlour dead-letters redrive 3-9f2c11aa-512         has it attempted again, as often as at first
  parlour dead-letters redrive --agent-type report --limit 10
  parlour dead-letters discard 3-9f2c11aa-512 --reason 'a test'")]
    DeadLetters(DeadLetters),
    /// Publishes an event to a topic
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour publish news/today 'the kettle is on'
  parlour publish orders.created/shop-1 @order.json --content-type application/json
  parlour publish orders.paid/shop-1 @order.json --durable --idempotency-key order-7

With --durable it is kept until all have had it to whom it is owed: the agents that subscribe now,
and the subscriptions that `parlour subscriptions ls` lists.")]
    Publish(Publish),
    /// Prints the events of a topic as they come, one JSON document per line
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour subscribe news                              any source
  parlour subscribe 'orders.*'                        types that begin with `orders.`
  parlour subscribe news/today --count 1              one source, one event
  parlour subscribe news --output text")]
    Subscribe(Subscribe),
    /// Keeps subscriptions that outlive their workers and the host, and says how far behind they are
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour subscriptions set mail orders.paid mailer   each `parlour publish orders.paid/… --durable`
  parlour subscriptions set audit 'orders.*' auditor --order strict
  parlour subscriptions ls
  parlour subscriptions show mail
  parlour subscriptions rm mail                       what it was owed before is still delivered

LAG counts what is owed and has not been delivered, dead letters among it; OLDEST is for how long
the first of that has waited.")]
    Subscriptions(Subscriptions),
    /// Lists the agent types that workers serve now; and says how those get what was accepted for later
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour agents
  parlour agents --output jsonl
  parlour agents pause report                         what is accepted waits until `resume`
  parlour agents set report concurrency=2 rate=0.5    at most two at once, one in two seconds
  parlour agents settings report                      what was set, and what holds
  parlour agents purge report --reason 'a mistake'    cancels what waits

REGISTERED KEYS counts the agents that were registered one by one, as a 0.1.0 program can, and not
those that a worker makes for the keys that are called.",
        args_conflicts_with_subcommands = true)]
    Agents(Agents),
    /// Lists who is connected: workers, and callers and followers too; or has a worker leave
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour workers
  parlour workers --json
  parlour workers drain upper-7                       no new work; ends when it has done what it has

KEYS are those with a call in flight, CREDIT is how many more messages the client may be sent now,
QUEUED how many wait for that, and FOR how long it has been connected.",
        args_conflicts_with_subcommands = true)]
    Workers(Workers),
    /// Says whether the host is ready, and how busy it is; exits with 1 if it is not ready
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour status
  parlour status --url http://127.0.0.1:9001 --json")]
    Status(Client),
    /// Copies what a host keeps into a new file, while it runs or not, and checks the copy
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour backup /mnt/backups/room-$(date +%F).db
  parlour backup room.db --data /srv/parlour

What was acknowledged before it begins is in it. The file is there once all of it is on the disk and
was checked: there is never half of one.")]
    Backup(Backup),
    /// Puts a backup into a directory that has no data yet
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour restore /mnt/backups/room-2026-11-01.db --data /srv/parlour-restored
  parlour serve --data /srv/parlour-restored

What is damaged is not restored. What was accepted after the backup is not known to the room: its ids
name nothing, and no new message gets one of them.")]
    Restore(Restore),
    /// Reads all that a host keeps, or a backup, and says what is damaged; exits with 74 if anything is
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour verify                                      beside a host that runs, or without one
  parlour verify room.db                              a backup
  parlour verify --repair-view                        has a wrong index of what has ended made anew")]
    Verify(Verify),
    /// Looks at what a host needs of this machine, and says how to remedy what it lacks
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour doctor
  parlour doctor --data /srv/parlour --listen 0.0.0.0:9000 --json

Exits with 0 if nothing has failed, warnings or not; else with the code of the first failure: 74 for the
disk, 75 for a port or directory that is taken, 78 for data or an address that cannot be used, or 1.")]
    Doctor(Doctor),
    /// Shows and checks the host's settings
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour config show --origin                        each setting, and where it was set
  parlour config check                                what `parlour serve` would read here
  parlour config check parlour.toml                   this file alone")]
    Config(Config),
    /// Explains a kind of fault, or lists them all; needs no host
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour explain worker_lost
  parlour explain")]
    Explain(Explain),
    /// Loads a host, and says how fast it is and what it uses
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour bench call --connections 64 --in-flight 4
  parlour bench call --door rest --payload 10000 --json
  parlour bench publish --connections 8 --in-flight 8
  parlour bench accept --connections 8 --in-flight 64
  parlour bench fanout --subscribers 100 --batch 1
  parlour bench idle --workers 1000 --host-pid \"$(pidof parlour)\"")]
    Bench(bench::Args),
    /// Prints a completion script for a shell
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour completion bash > ~/.local/share/bash-completion/completions/parlour
  parlour completion fish > ~/.config/fish/completions/parlour.fish")]
    Completion {
        /// Which shell
        shell: Shell,
    },
    /// Prints the version
    Version,
    /// A worker of `parlour demo`
    #[command(hide = true)]
    DemoWorker(DemoWorker),
    /// The host that `parlour demo` kills
    #[command(hide = true)]
    DemoHost(DemoHost),
}

#[derive(Debug, Arguments)]
pub(crate) struct Demo {
    /// End afterwards, with 0 if all went as it should
    #[arg(long)]
    pub(crate) once: bool,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Serve {
    /// Address and port of all doors; port 0 takes a free one [default: 127.0.0.1:9000]
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<String>,
    /// Directory of what is kept on disk [default: parlour under $XDG_DATA_HOME]
    #[arg(long, value_name = "DIR", conflicts_with = "memory")]
    pub(crate) data: Option<PathBuf>,
    /// Keep nothing on disk
    #[arg(long)]
    pub(crate) memory: bool,
    /// File with the one token that clients must show
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Let everyone in who can reach the address
    #[arg(long)]
    pub(crate) insecure: bool,
    #[command(flatten)]
    pub(crate) sources: Sources,
}

/// Where settings come from, beside the environment and the usual files.
#[derive(Clone, Debug, Default, Arguments)]
pub(crate) struct Sources {
    /// File with settings, read over ./parlour.toml and those of the user and the machine
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// One setting, such as limits.payload_bytes=4MiB
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    pub(crate) set: Vec<(String, String)>,
}

/// What a host keeps.
#[derive(Clone, Debug, Arguments)]
#[command(next_help_heading = "Data")]
pub(crate) struct Data {
    /// Directory of what the host keeps on disk [default: parlour under $XDG_DATA_HOME]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) sources: Sources,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Backup {
    /// The file to write, which must not be there yet
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Restore {
    /// The backup
    #[arg(value_name = "BACKUP")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Verify {
    /// A backup, to look at instead of what a host keeps
    #[arg(value_name = "BACKUP", conflicts_with = "data")]
    pub(crate) file: Option<PathBuf>,
    /// Remove the index of what has ended if it is wrong: the next host makes it anew
    #[arg(long, conflicts_with = "file")]
    pub(crate) repair_view: bool,
    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Agents {
    #[command(subcommand)]
    pub(crate) action: Option<AgentsAction>,
    #[command(flatten)]
    pub(crate) client: Client,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum AgentsAction {
    /// Has what is accepted for a type wait; what is in flight goes on
    Pause(AgentType),
    /// Has it delivered again
    Resume(AgentType),
    /// Cancels what waits for a type; what is in flight goes on
    Purge {
        #[command(flatten)]
        of: AgentType,
        /// Why, for those who look later
        #[arg(long)]
        reason: Option<String>,
    },
    /// Shows what was set for a type and what holds, or lists the types that something was set for
    Settings {
        /// The agent type
        #[arg(value_name = "TYPE")]
        agent_type: Option<String>,
        #[command(flatten)]
        client: Client,
    },
    /// Changes what holds for a type, kept until it is changed again
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour agents set report concurrency=2             at most two attempts at once
  parlour agents set report rate=5 burst=10           attempts per second, and at once after a pause
  parlour agents set report order=strict              each agent has one at a time, until settled
  parlour agents set report max_attempts=8 backoff_base=1s backoff_cap=10m attempt_timeout=2h
  parlour agents set report rate=                     without a value, what the host has")]
    Set {
        #[command(flatten)]
        of: AgentType,
        /// What to change
        #[arg(value_name = "NAME=VALUE", required = true, value_parser = pair)]
        settings: Vec<(String, String)>,
    },
    /// Has what the host's settings say hold again for a type, which is then not paused either
    Reset(AgentType),
}

/// An agent type, and where the host is.
#[derive(Clone, Debug, Arguments)]
pub(crate) struct AgentType {
    /// The agent type
    #[arg(value_name = "TYPE")]
    pub(crate) agent_type: String,
    #[command(flatten)]
    pub(crate) client: Client,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Doctor {
    /// Address and port that a host is to have [default: 127.0.0.1:9000]
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<String>,
    #[command(flatten)]
    pub(crate) data: Data,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Workers {
    #[command(subcommand)]
    pub(crate) action: Option<WorkersAction>,
    #[command(flatten)]
    pub(crate) client: Client,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum WorkersAction {
    /// Gives a worker no new work, and has it leave once what it has has ended
    #[command(help_template = TEMPLATE, before_help = "\
Examples:
  parlour workers drain upper-7
  parlour workers drain 12                            by its number, where a name is not enough")]
    Drain(Drain),
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Drain {
    /// The worker's name or number, as `parlour workers` shows them
    #[arg(value_name = "NAME")]
    pub(crate) worker: String,
    #[command(flatten)]
    pub(crate) client: Client,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Worker {
    /// The agent type to serve
    #[arg(value_name = "TYPE")]
    pub(crate) agent_type: String,
    /// Answer with the payload as it came, content type and data type included
    #[arg(long, conflicts_with = "command")]
    pub(crate) echo: bool,
    /// Be the only worker of this type, or fail
    #[arg(long)]
    pub(crate) exclusive: bool,
    /// How many keys to take beside other workers of this type: 2 gets twice as many as 1
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) capacity: u16,
    /// What these agents can do, for callers that look for it
    #[arg(long = "capability", value_name = "NAME")]
    pub(crate) capabilities: Vec<String>,
    /// What the worker calls itself; one that is started again under its name takes over from the one
    /// that was lost [default: the agent type and the process's number]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Content type of replies [default: text/plain; charset=utf-8 if they are UTF-8]
    #[arg(long, value_name = "TYPE", conflicts_with = "echo")]
    pub(crate) content_type: Option<String>,
    #[command(flatten)]
    pub(crate) client: Client,
    /// The program to run for each call, and its arguments
    #[arg(last = true, required_unless_present = "echo", help_heading = "Arguments")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Call {
    /// The agent to call [default key: default]
    #[arg(value_name = "TYPE[/KEY]")]
    pub(crate) target: String,
    #[command(flatten)]
    pub(crate) body: Body,
    /// How long to wait for the reply, such as 500ms, 5s or 2m
    #[arg(long, default_value = "30s", value_parser = duration)]
    pub(crate) timeout: Duration,
    /// Show what the agent says before its reply: a line of stderr each, with --output jsonl of stdout
    #[arg(long)]
    pub(crate) progress: bool,
    #[command(flatten)]
    pub(crate) client: Client,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Send {
    /// The agent it is for [default key: default]
    #[arg(value_name = "TYPE[/KEY]")]
    pub(crate) target: String,
    #[command(flatten)]
    pub(crate) body: Body,
    /// Your name for the work: sent again under it, it is accepted once
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<String>,
    /// Deliver it no sooner than in this time, such as 5s or 2h
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) delay: Option<Duration>,
    /// Give it up unless an attempt has begun by then
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) ttl: Option<Duration>,
    /// How many attempts may fail [default: the host's durable.max_attempts]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_attempts: Option<u32>,
    /// Wait so long for its reply, and print that
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) wait: Option<Duration>,
    #[command(flatten)]
    pub(crate) client: Client,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Deliveries {
    #[command(subcommand)]
    pub(crate) action: DeliveriesAction,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum DeliveriesAction {
    /// Lists those that have not ended, and the dead, the oldest first
    Ls {
        /// Only those in this state, such as accepted, waiting, processing or dead
        #[arg(long)]
        state: Option<String>,
        #[command(flatten)]
        listed: Listed,
        #[command(flatten)]
        client: Client,
    },
    /// Shows one with every step of its life
    Show {
        /// Its id
        id: String,
        #[command(flatten)]
        client: Client,
    },
    /// Waits until it has ended, and prints its reply
    Wait {
        /// Its id
        id: String,
        /// How long
        #[arg(long, default_value = "1h", value_parser = duration)]
        timeout: Duration,
        #[command(flatten)]
        client: Client,
    },
    /// Gives it up, wherever it is
    Cancel {
        /// Its id
        id: String,
        /// Why, for those who look later
        #[arg(long)]
        reason: Option<String>,
        #[command(flatten)]
        client: Client,
    },
}

impl DeliveriesAction {
    /// Where the host is.
    pub(crate) fn client(&self) -> &Client {
        let (Self::Ls { client, .. }
        | Self::Show { client, .. }
        | Self::Wait { client, .. }
        | Self::Cancel { client, .. }) = self;
        client
    }
}

/// What a list is to have.
#[derive(Clone, Debug, Arguments)]
pub(crate) struct Listed {
    /// Only those for agents of this type
    #[arg(long, value_name = "TYPE")]
    pub(crate) agent_type: Option<String>,
    /// How many at the most
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: u64,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct DeadLetters {
    #[command(subcommand)]
    pub(crate) action: DeadLettersAction,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum DeadLettersAction {
    /// Lists them, the oldest first
    Ls {
        #[command(flatten)]
        listed: Listed,
        #[command(flatten)]
        client: Client,
    },
    /// Shows one: why it failed each time, and what was to be delivered
    Show {
        /// Its id
        id: String,
        #[command(flatten)]
        client: Client,
    },
    /// Has some attempted again, as often as at first
    Redrive {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        client: Client,
    },
    /// Gives some up
    Discard {
        #[command(flatten)]
        which: Which,
        /// Why, for those who look later
        #[arg(long)]
        reason: Option<String>,
        #[command(flatten)]
        client: Client,
    },
}

/// Which dead letters something is done to.
#[derive(Clone, Debug, Arguments)]
pub(crate) struct Which {
    /// Their ids
    #[arg(required_unless_present = "agent_type", conflicts_with = "agent_type")]
    pub(crate) ids: Vec<String>,
    /// All for agents of this type
    #[arg(long, alias = "type", value_name = "TYPE")]
    pub(crate) agent_type: Option<String>,
    /// Of these so many at the most
    #[arg(long, value_name = "N", requires = "agent_type", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
}

impl DeadLettersAction {
    /// Where the host is.
    pub(crate) fn client(&self) -> &Client {
        let (Self::Ls { client, .. }
        | Self::Show { client, .. }
        | Self::Redrive { client, .. }
        | Self::Discard { client, .. }) = self;
        client
    }
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Publish {
    /// The topic
    #[arg(value_name = "TYPE/SOURCE")]
    pub(crate) topic: String,
    #[command(flatten)]
    pub(crate) body: Body,
    /// Keep it until all have had it to whom it is owed
    #[arg(long)]
    pub(crate) durable: bool,
    /// Your name for the work: published again under it, it is accepted once
    #[arg(long, value_name = "KEY", requires = "durable")]
    pub(crate) idempotency_key: Option<String>,
    #[command(flatten)]
    pub(crate) client: Client,
}

/// What to send.
#[derive(Clone, Debug, Arguments)]
pub(crate) struct Body {
    /// The payload: a text, @FILE, or - for stdin, which is also read if it is not a terminal
    #[arg(value_name = "BODY | @FILE | -", allow_negative_numbers = true)]
    pub(crate) body: Option<String>,
    /// Content type of the payload [default: text/plain; charset=utf-8 if it is UTF-8]
    #[arg(long, value_name = "TYPE")]
    pub(crate) content_type: Option<String>,
    /// What the payload is to the agent
    #[arg(long, value_name = "TYPE")]
    pub(crate) data_type: Option<String>,
    /// Metadata that goes along
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub(crate) meta: Vec<(String, String)>,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Subscribe {
    /// A topic type, a beginning of one with `*` behind, or a whole topic TYPE/SOURCE
    pub(crate) pattern: String,
    /// End after this many events
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<u64>,
    #[command(flatten)]
    pub(crate) client: Client,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct Subscriptions {
    #[command(subcommand)]
    pub(crate) action: SubscriptionsAction,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum SubscriptionsAction {
    /// Lists them, and how far behind each is
    Ls {
        #[command(flatten)]
        client: Client,
    },
    /// Shows one
    Show {
        /// Its name
        name: String,
        #[command(flatten)]
        client: Client,
    },
    /// Makes one, or changes it for the events that come
    Set {
        /// Its name, of your choice
        name: String,
        /// A topic type, or a beginning of one with `*` behind
        pattern: String,
        /// The type of the agents that get the events, each those of its own source
        agent_type: String,
        /// With `strict` an agent gets one event at a time, each when the one before has ended
        #[arg(
            long,
            value_name = "relaxed|strict",
            hide_possible_values = true,
            default_value = "relaxed"
        )]
        order: Order,
        #[command(flatten)]
        client: Client,
    },
    /// Ends one: nothing more is owed to it
    Rm {
        /// Its name
        name: String,
        #[command(flatten)]
        client: Client,
    },
}

impl SubscriptionsAction {
    /// Where the host is.
    pub(crate) fn client(&self) -> &Client {
        let (Self::Ls { client }
        | Self::Show { client, .. }
        | Self::Set { client, .. }
        | Self::Rm { client, .. }) = self;
        client
    }
}

/// In which order an agent gets what it is owed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Order {
    Relaxed,
    Strict,
}

#[derive(Debug, Arguments)]
pub(crate) struct Config {
    #[command(subcommand)]
    pub(crate) action: ConfigAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigAction {
    /// Prints each setting as `parlour serve` would use it here
    Show {
        /// Say where each was set
        #[arg(long)]
        origin: bool,
        #[command(flatten)]
        sources: Sources,
    },
    /// Says what is wrong with the settings; exits with 78 if anything is
    Check {
        /// Check this file alone
        file: Option<PathBuf>,
    },
}

#[derive(Debug, Arguments)]
pub(crate) struct Explain {
    /// The kind, as it stands in an error
    pub(crate) kind: Option<String>,
}

/// What a worker of the demonstration does.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum DemoKind {
    Reverse,
    Upper,
    Slow,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct DemoWorker {
    pub(crate) kind: DemoKind,
    #[arg(long)]
    pub(crate) url: String,
}

#[derive(Clone, Debug, Arguments)]
pub(crate) struct DemoHost {
    #[arg(long)]
    pub(crate) data: String,
}

/// Reads `NAME=VALUE`.
fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.trim().into(), value.into())),
        _ => Err("expected NAME=VALUE".into()),
    }
}

/// Reads `KEY=VALUE`.
pub(crate) fn setting(text: &str) -> Result<(String, String), String> {
    pair(text).map_err(|_| "expected KEY=VALUE, such as limits.payload_bytes=4MiB".into())
}

/// Reads a time such as `500ms`, `5s` or `2m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(millis)) {
        Some(millis) if millis > 0 => Ok(Duration::from_millis(millis)),
        _ => Err("expected a time such as 500ms, 5s or 2m".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn times_have_a_unit_and_are_not_zero() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "5", "0s", "s", "-1s", "1.5s", "99999999999999999999s", "5 s"] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }
}
