//! `parlour backup`: copies what a host keeps, while it runs or not.

use parlour_host::store::Store;

use crate::args::Backup;
use crate::data;
use crate::exit::{Code, Failure};
use crate::output::Output;
use crate::verbs::verify;

pub(crate) fn run(args: &Backup, output: &Output) -> Result<Code, Failure> {
    let settings = data::settings(&args.data, output)?;
    let dir = data::directory(&settings.config)?;
    let file = args.file.clone();
    let report =
        data::work(output, move |stop, watch| Store::open(&dir, stop)?.backup(&file, watch))?;
    verify::show(&args.file, &report, output)?;
    Ok(Code::Ok)
}
