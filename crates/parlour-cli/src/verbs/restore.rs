//! `parlour restore`: puts a backup into a directory that has no data yet.

use parlour_host::store::Store;

use crate::args::Restore;
use crate::data;
use crate::exit::{Code, Failure};
use crate::output::Output;
use crate::verbs::verify;

pub(crate) fn run(args: &Restore, output: &Output) -> Result<Code, Failure> {
    let settings = data::settings(&args.data, output)?;
    let dir = data::directory(&settings.config)?;
    verify::refuse_directory(&args.file)?;
    let (file, to) = (args.file.clone(), dir.clone());
    let report = data::work(output, move |stop, watch| {
        Store::open_backup(&file, stop)?.restore(&to, watch)
    })?;
    verify::show(&dir, &report, output)?;
    Ok(Code::Ok)
}
